// The subset head's arithmetic against float64 sums and against the full head's sampler.
#include "engine/subset_head.h"
#include "tests/test_random.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <limits>
#include <set>

namespace infemeral {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

}  // namespace

TEST_CASE("confidence is the likeliest token's share, whatever the order") {
  for (int round = 0; round < 500; ++round) {
    const std::size_t n = 1 + random_index(3000);
    std::vector<float> scores = normals(n, 0.1f * static_cast<float>(1 + random_index(100)));
    SamplingParams params;
    if (round % 3 == 1) params.temperature = 0.05f + 0.01f * static_cast<float>(random_index(300));
    // Temperatures below 1 are taken out again, those above 1 are not.
    const double flatten = params.greedy() ? 1 : std::min<double>(params.temperature, 1);
    const double max = *std::max_element(scores.begin(), scores.end());
    double total = 0, error = 0;
    for (float score : scores) {
      const double depth = (max - score) * flatten;
      total += std::exp(-depth);
      // Two roundings to float of the depth, and a whole number of units 2^-40.
      error += std::exp(-depth) * (std::exp(depth * 0x1p-22) - 1) + 0x1p-40;
    }
    CAPTURE(round, n, params.temperature, total, error);
    const double confidence = subset_confidence(scores, params);
    CHECK(std::fabs(1 / confidence - total) <= error);
    CHECK(confidence <= 1);
    std::shuffle(scores.begin(), scores.end(), rng());
    CHECK(subset_confidence(scores, params) == confidence);
  }
}

TEST_CASE("temperature: a cold one is no evidence, a hot one is doubt") {
  const std::vector<float> logits = normals(500, 4);
  const auto at = [&](float temperature) {
    std::vector<float> scores = logits;
    for (float& score : scores) score /= temperature;
    return subset_confidence(scores, {.temperature = temperature});
  };
  const double plain = subset_confidence(logits, {});
  CHECK(at(1) == plain);
  for (float cold : {0.9f, 0.3f, 0.01f}) CHECK(at(cold) == Approx(plain).epsilon(1e-4));
  CHECK(at(1.5f) < plain);
  CHECK(at(3) < at(1.5f));
}

TEST_CASE("a row that is not all numbers is never confident") {
  CHECK(subset_confidence(std::vector<float>{3}, {}) == 1);
  CHECK(subset_confidence(std::vector<float>{3, -kInfinity}, {}) == 1);
  CHECK(subset_confidence(std::vector<float>{3, 3}, {}) == 0.5);
  CHECK(subset_confidence({}, {}) == 0);
  for (float bad : {kNan, kInfinity}) {
    for (std::size_t n : {1, 2, 50}) {
      std::vector<float> scores = normals(n, 1);
      scores[0] = 100;  // else certain
      if (n > 1) CHECK(subset_confidence(scores, {}) > kSubsetConfidence);
      scores[random_index(n)] = bad;
      CHECK(subset_confidence(scores, {}) == 0);
    }
  }
  CHECK(subset_confidence(std::vector<float>{-kInfinity, -kInfinity}, {}) == 0);
}

TEST_CASE("an accepted token is the full sampler's where every other token is impossible") {
  std::size_t accepted = 0, refused = 0;
  for (int round = 0; round < 4000; ++round) {
    const std::size_t vocab = 2 + random_index(400);
    std::set<std::int32_t> chosen;
    while (chosen.empty() || (chosen.size() < vocab && random_index(1 + vocab / 8) != 0)) {
      chosen.insert(static_cast<std::int32_t>(random_index(vocab)));
    }
    const std::vector<std::int32_t> ids(chosen.begin(), chosen.end());
    std::vector<float> logits = normals(vocab, 8);
    if (random_index(4) == 0) {  // ties
      for (float& logit : logits) logit = std::round(logit / 4);
    }
    std::vector<std::int32_t> history(random_index(20));
    for (std::int32_t& id : history) id = static_cast<std::int32_t>(random_index(vocab));
    SampleRequest request{.position = random_index(1000), .history = history};
    SamplingParams& params = request.params;
    params.seed = rng()();
    if (random_index(3) != 0)
      params.temperature = 0.1f + 0.1f * static_cast<float>(random_index(20));
    if (random_index(3) == 0) params.top_k = static_cast<int>(1 + random_index(vocab));
    if (random_index(3) == 0) params.top_p = 0.05f + 0.1f * static_cast<float>(random_index(10));
    if (random_index(3) == 0) params.min_p = 0.1f * static_cast<float>(random_index(10));
    if (random_index(3) == 0)
      params.repetition_penalty = 0.5f + 0.1f * static_cast<float>(random_index(15));

    std::vector<float> subset_logits, masked(vocab, -kInfinity);
    for (std::int32_t id : ids) {
      const auto i = static_cast<std::size_t>(id);
      subset_logits.push_back(logits[i]);
      masked[i] = logits[i];
    }
    // The scores as the definition says, by the full row's way.
    Scorer scorer;
    std::vector<float> scores = masked;
    scorer.start(request, vocab);
    scorer.score(scores);
    const bool expected = subset_confidence(scores, params) >= kSubsetConfidence;

    SubsetSampler subset(ids, vocab);
    const auto token = subset.sample(subset_logits, request);
    CAPTURE(round, vocab, ids, params.temperature, params.top_k, params.top_p, params.min_p,
            params.repetition_penalty, params.seed);
    REQUIRE(token.has_value() == expected);
    (token ? accepted : refused) += 1;
    if (!token) continue;
    Sampler full;
    REQUIRE(*token == full.sample(masked, request));
  }
  CHECK(accepted > 400);
  CHECK(refused > 400);
}

}  // namespace infemeral
