#include "engine/sampling.h"
#include "tests/test_random.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>

namespace infemeral {
namespace {

// The stages as Hugging Face describes them, slowly: sort everything, float64 probabilities.
std::vector<double> reference_distribution(const std::vector<float>& logits,
                                           const SampleRequest& request) {
  const SamplingParams& p = request.params;
  std::vector<double> x(logits.begin(), logits.end());
  std::vector<bool> penalised(x.size());
  for (std::int32_t id : request.history) {
    if (penalised[static_cast<std::size_t>(id)]) continue;
    penalised[static_cast<std::size_t>(id)] = true;
    double& v = x[static_cast<std::size_t>(id)];
    v = v > 0 ? v / p.repetition_penalty : v * p.repetition_penalty;
  }
  for (double& v : x) v /= p.temperature;
  std::vector<std::size_t> order(x.size());
  std::iota(order.begin(), order.end(), 0u);
  std::sort(order.begin(), order.end(), [&](auto a, auto b) { return x[a] > x[b]; });
  std::size_t keep = order.size();
  if (p.top_k > 0) keep = std::min<std::size_t>(keep, static_cast<std::size_t>(p.top_k));
  double z = 0;
  for (std::size_t i = 0; i < keep; ++i) z += std::exp(x[order[i]] - x[order[0]]);
  if (p.top_p < 1) {
    double inside = 0;
    for (std::size_t i = 0; i < keep; ++i) {
      inside += std::exp(x[order[i]] - x[order[0]]) / z;
      if (inside >= p.top_p) keep = i + 1;
    }
  }
  if (p.min_p > 0) {
    while (keep > 1 && std::exp(x[order[keep - 1]] - x[order[0]]) < p.min_p) --keep;
  }
  std::vector<double> probability(x.size(), 0);
  z = 0;
  for (std::size_t i = 0; i < keep; ++i) z += std::exp(x[order[i]] - x[order[0]]);
  for (std::size_t i = 0; i < keep; ++i) {
    probability[order[i]] = std::exp(x[order[i]] - x[order[0]]) / z;
  }
  return probability;
}

}  // namespace

TEST_CASE("Philox4x32-10 gives the published vectors") {
  // Random123's kat_vectors: counter and key all zero, all ones, and the digits of pi.
  const auto check = [](std::uint64_t seed, std::uint64_t sub, std::uint64_t block,
                        std::array<std::uint32_t, 4> expected) {
    const PhiloxWords words = philox4x32(seed, sub, block);
    for (std::size_t i = 0; i < 4; ++i) CHECK(words.word[i] == expected[i]);
  };
  check(0, 0, 0, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
  check(~0ull, ~0ull, ~0ull, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
  check(0x299f31d0a4093822ull, 0x0370734413198a2eull, 0x85a308d3243f6a88ull,
        {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});
}

TEST_CASE("greedy takes the maximum, the lowest id of equals, never NaN") {
  Sampler sampler;
  std::vector<float> logits = normals(1000, 3);
  logits[7] = logits[900] = 50;
  logits[3] = std::numeric_limits<float>::quiet_NaN();
  CHECK(sampler.sample(logits, {}) == 7);
}

TEST_CASE("what survives the filters, and how often, is what the definition says") {
  struct Case {
    SamplingParams params;
    std::vector<std::int32_t> history;
  };
  const std::vector<Case> cases = {
      {{.temperature = 1}, {}},
      {{.temperature = 0.7f, .top_p = 0.9f}, {}},
      {{.temperature = 1.3f, .top_k = 5}, {}},
      {{.temperature = 1, .min_p = 0.1f}, {}},
      {{.temperature = 0.8f, .top_k = 12, .top_p = 0.8f, .min_p = 0.05f}, {}},
      {{.temperature = 1, .top_k = 20, .repetition_penalty = 1.5f}, {1, 2, 2, 3, 5, 8}},
  };
  Sampler sampler;
  const std::size_t vocab = 200;
  const int draws = 20000;
  for (const Case& c : cases) {
    const std::vector<float> logits = normals(vocab, 2);
    SampleRequest request{.params = c.params, .position = 0, .history = c.history};
    request.params.seed = rng()();
    const std::vector<double> expected = reference_distribution(logits, request);
    std::vector<int> counts(vocab, 0);
    for (int i = 0; i < draws; ++i) {
      request.position = static_cast<std::uint64_t>(i);
      std::vector<float> scratch = logits;
      ++counts[static_cast<std::size_t>(sampler.sample(scratch, request))];
    }
    for (std::size_t i = 0; i < vocab; ++i) {
      const double mean = expected[i] * draws;
      if (expected[i] == 0) {
        CHECK(counts[i] == 0);
      } else {
        // Six standard deviations of the binomial, plus one draw: about 1e-9 a check by chance.
        CHECK(std::fabs(counts[i] - mean) <= 6 * std::sqrt(mean * (1 - expected[i])) + 1);
      }
    }
  }
}

TEST_CASE("the same seed and position give the same token, whatever else is in the buffers") {
  Sampler warm, fresh;
  const std::vector<float> logits = normals(5000, 3);
  SampleRequest request{.params = {.temperature = 1, .top_p = 0.95f, .seed = 42}};
  for (request.position = 0; request.position < 50; ++request.position) {
    std::vector<float> a = logits, b = logits, noise = normals(5000, 3);
    warm.sample(noise, request);
    Sampler once;
    CHECK(warm.sample(a, request) == once.sample(b, request));
  }
}

TEST_CASE("a tiny temperature is greedy") {
  Sampler sampler;
  for (float temperature : {9e-6f, 1e-30f, 1e-40f}) {
    for (int round = 0; round < 20; ++round) {
      const std::vector<float> logits = normals(500, 3);
      std::vector<float> a = logits, b = logits;
      SampleRequest request{.params = {.temperature = temperature, .seed = rng()()}};
      CHECK(sampler.sample(a, request) == sampler.sample(b, {}));
    }
  }
}

TEST_CASE("what is kept does not depend on the order in which candidates come") {
  for (int round = 0; round < 200; ++round) {
    std::vector<Candidate> candidates;
    for (float score : normals(300, 2)) {
      candidates.push_back({score, static_cast<std::int32_t>(candidates.size())});
    }
    SampleRequest request{.params = {.temperature = 1, .top_p = 0.9f}};
    request.params.seed = rng()();
    if (round % 2 == 0) request.params.top_k = 50;
    std::vector<Candidate> shuffled = candidates;
    std::shuffle(shuffled.begin(), shuffled.end(), rng());
    CHECK(choose(candidates, request, {}) == choose(shuffled, request, {}));
  }
}

TEST_CASE("a token that the rest could change is not chosen") {
  // Probabilities 0.5, 0.3, 0.2 before the rest's.
  const std::vector<Candidate> all = {
      {std::log(0.3f), 7}, {std::log(0.5f), 3}, {std::log(0.2f), 9}};
  const auto mass = [](double share) { return static_cast<std::uint64_t>(share / 0.5 * 0x1p40); };
  const auto chosen = [&](float top_p, std::uint64_t seed, const Rest& rest) {
    std::vector<Candidate> candidates = all;
    const auto token =
        choose(candidates, {.params = {.temperature = 1, .top_p = top_p, .seed = seed}}, rest);
    if (!token) CHECK(candidates.size() == all.size());
    return token;
  };
  int refused = 0;
  for (std::uint64_t seed = 0; seed < 300; ++seed) {
    const auto of_two = chosen(0.7f, seed, {}), of_three = chosen(0.9f, seed, {});
    REQUIRE((of_two && of_two != 9 && of_three));
    // 0.7 of 1.1 is 0.77 < 0.8: the cut stays after two.
    CHECK(chosen(0.7f, seed, {.ceiling = -3, .mass = mass(0.1)}) == of_two);
    // 0.7 of 1.2 is 0.84: it may lie after three, which matters when the third would win.
    const auto either = chosen(0.7f, seed, {.ceiling = -3, .mass = mass(0.2)});
    CHECK(either == (of_three == 9 ? std::nullopt : of_two));
    refused += either ? 0 : 1;
    // A token of the rest could be as likely as the last one inside.
    CHECK(!chosen(0.7f, seed, {.ceiling = std::log(0.3f), .mass = mass(0.1)}));
    // 0.7 of 1.5 is more than all three have.
    CHECK(!chosen(0.7f, seed, {.ceiling = -3, .mass = mass(0.5)}));
    // Without top-p the rest does not matter.
    CHECK(chosen(1, seed, {.ceiling = 0, .mass = mass(5)}));
  }
  CHECK((refused > 20 && refused < 120));  // 60 are expected
}

TEST_CASE("a part of the tokens gives the token of all, or none") {
  std::size_t shown = 0, cases = 0;
  for (int round = 0; round < 4000; ++round) {
    const double spread = std::uniform_real_distribution<double>(0.1, 4)(rng());
    std::vector<Candidate> all, some;
    float max = -HUGE_VALF;
    for (float score : normals(1 + rng()() % 400, spread)) {
      if (round % 5 == 0) score = std::round(score * 2) / 2;
      all.push_back({score, static_cast<std::int32_t>(all.size())});
      max = std::max(max, score);
    }
    const float edge =
        max - std::uniform_real_distribution<float>(0, static_cast<float>(4 * spread))(rng());
    Rest rest;
    for (const Candidate& c : all) {
      if (c.score >= edge) {
        some.push_back(c);
      } else {
        rest.ceiling = std::max(rest.ceiling, c.score);
        rest.mass += probability_mass(c.score, max);
      }
    }
    rest.mass += static_cast<std::uint64_t>(  // a bound, not the truth
        static_cast<double>(rest.mass) * std::uniform_real_distribution<double>(0, 0.5)(rng()));
    SampleRequest request{.params = {.temperature = 1}};
    request.params.top_p = std::uniform_real_distribution<float>(0.05f, 0.999f)(rng());
    if (round % 3 == 0) request.params.min_p = 0.1f;
    request.params.seed = rng()();
    const auto token = choose(some, request, rest);
    ++cases;
    if (!token) continue;
    ++shown;
    CHECK(token == choose(all, request, {}));
  }
  CHECK((shown > cases / 10 && shown < cases));
}

TEST_CASE("flat and extreme logits do not break the filters") {
  Sampler sampler;
  SampleRequest request{.params = {.temperature = 1, .top_k = 3, .top_p = 0.5f, .min_p = 0.5f}};
  std::vector<float> flat(1000, 1.5f);
  CHECK(sampler.sample(flat, request) >= 0);
  std::vector<float> extreme(1000, -std::numeric_limits<float>::infinity());
  extreme[17] = 3e38f;
  CHECK(sampler.sample(extreme, request) == 17);
  std::vector<float> nothing(10, std::numeric_limits<float>::quiet_NaN());
  CHECK(sampler.sample(nothing, request) == 0);
}

TEST_CASE("parameters outside their range are refused by name") {
  const auto message = [](SamplingParams p) { return std::string(validate(p).message()); };
  CHECK(validate({}).ok());
  CHECK(message({.temperature = -1}).find("temperature") == 0);
  CHECK(message({.temperature = NAN}).find("temperature") == 0);
  CHECK(message({.top_k = -2}).find("top_k") == 0);
  CHECK(message({.top_p = 0}).find("top_p") == 0);
  CHECK(message({.top_p = 1.5f}).find("top_p") == 0);
  CHECK(message({.min_p = 2}).find("min_p") == 0);
  CHECK(message({.repetition_penalty = 0}).find("repetition_penalty") == 0);
}

TEST_CASE("tokens whose noise can be large are found without logarithms") {
  for (int round = 0; round < 3000; ++round) {
    const std::uint64_t seed = rng()(), position = rng()() % 1000;
    const auto first = static_cast<std::uint32_t>(rng()() % 30000 * 4);
    const std::size_t n = 1 + rng()() % 64;
    const double least = std::uniform_real_distribution<double>(-4, 8)(rng());
    const std::uint64_t bits = noise_above(seed, position, first, n, least);
    for (std::size_t i = 0; i < 64; ++i) {
      const bool found = (bits >> i & 1) != 0;
      if (i >= n) {
        REQUIRE(!found);
        continue;
      }
      const double noise = gumbel_noise(seed, position, first + static_cast<std::uint32_t>(i));
      if (noise >= least) REQUIRE(found);
      // A bound -ln(1 - u) of 0.5 and more is at most 0.44 above the noise.
      if (noise < least - 0.5 && least > 0.5) REQUIRE(!found);
    }
  }
}

TEST_CASE("the token is the one that the definition gives, whatever is looked at on the way") {
  // The filters by full sorting, and noise for every survivor.
  const auto slow = [](const std::vector<float>& logits, const SampleRequest& request) {
    std::vector<float> scores = logits;
    Scorer scorer;
    scorer.start(request, scores.size());
    scorer.score(scores);
    std::vector<Candidate> all;
    for (std::size_t i = 0; i < scores.size(); ++i) {
      if (!std::isnan(scores[i])) all.push_back({scores[i], static_cast<std::int32_t>(i)});
    }
    return choose(all, request, {}).value();
  };
  const std::vector<SamplingParams> kinds = {{},
                                             {.temperature = 1},
                                             {.temperature = 0.2f},
                                             {.temperature = 5},
                                             {.temperature = 1, .repetition_penalty = 1.3f},
                                             {.temperature = 0.7f, .top_k = 50, .top_p = 0.9f},
                                             {.temperature = 0.7f, .top_k = 3},
                                             {.temperature = 2, .top_k = 400, .top_p = 0.5f},
                                             {.temperature = 1, .top_k = 100000},
                                             {.temperature = 0.7f, .top_p = 0.9f},
                                             {.temperature = 3, .top_p = 0.999f},
                                             {.temperature = 1, .min_p = 0.05f},
                                             {.temperature = 1, .top_k = 20, .min_p = 0.05f},
                                             {.temperature = 1, .top_p = 0.8f, .min_p = 0.1f}};
  Sampler sampler;
  for (int round = 0; round < 2000; ++round) {
    const std::size_t n = 1 + rng()() % (round % 2 == 0 ? 3000 : 40);
    std::vector<float> logits = normals(n, round % 3 == 0 ? 0.5f : 4);
    for (float& x : logits) {
      if (round % 5 == 0) x = std::round(x);  // ties
      if (round % 7 == 0) x -= 300000;
      if (round % 17 == 0) x = 0x1p48f;  // where noise is a few units of rounding
      if (round % 11 == 0 && rng()() % 50 == 0) x = std::numeric_limits<float>::quiet_NaN();
      if (round % 13 == 0 && rng()() % 3 == 0) x = -std::numeric_limits<float>::infinity();
    }
    logits[rng()() % n] = 1;  // not all NaN
    std::vector<std::int32_t> history(rng()() % 20);
    for (std::int32_t& id : history) id = static_cast<std::int32_t>(rng()() % n);
    for (SamplingParams params : kinds) {
      // Filters that are just not, or just barely, at work.
      if (params.top_k > 0 && rng()() % 4 == 0) params.top_k = static_cast<int>(n + rng()() % 2);
      SampleRequest request{.params = params, .position = rng()() % 1000, .history = history};
      request.params.seed = rng()();
      std::vector<float> scratch = logits;
      CAPTURE(round, n, params.temperature, params.top_k, params.top_p, params.min_p);
      REQUIRE(sampler.sample(scratch, request) == slow(logits, request));
    }
  }
}

}  // namespace infemeral
