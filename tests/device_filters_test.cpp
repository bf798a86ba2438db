// Top-k and top-p of the CUDA backend, as one block computes them, on the host: against sorting.
#include "tests/emulated_block.h"
// The device code after what stands in for the device.
#include "kernels/filters.cuh"

#include <algorithm>
#include <catch2/catch.hpp>
#include <functional>
#include <limits>
#include <vector>

#include "engine/sampling.h"
#include "tests/test_random.h"

namespace infemeral {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Problem {
  std::vector<cuda::ScoredToken> items;
  std::vector<float> scores;
  cuda::RowRequest request = {};
  float max = -kInfinity;
};

// From flat to peaked; with ties, and with both zeros.
Problem random_problem(std::size_t n) {
  Problem p;
  const float spread = std::exp(uniform(-3, 4));
  const bool many_ties = rng()() % 5 == 0;
  for (std::size_t i = 0; i < n; ++i) {
    float score = normal(spread);
    if (rng()() % 4 == 0) score = std::round(score);
    if (many_ties && rng()() % 2 == 0) score = 1.5f;
    p.items.push_back({score, static_cast<std::int32_t>(i)});
    p.scores.push_back(score);
    p.max = std::max(p.max, score);
  }
  p.request.top_k = rng()() % 2 == 0 ? 0 : 1 + static_cast<int>(rng()() % (n + 10));
  const bool with_p = p.request.top_k == 0 || rng()() % 4 != 0;
  p.request.top_p = with_p ? uniform(0.05f, 0.999f) : 1;
  return p;
}

// The same by sorting.
cuda::Filtered expected(const Problem& p) {
  cuda::Filtered kept;
  std::vector<float> sorted = p.scores;
  std::sort(sorted.begin(), sorted.end(), std::greater<>());
  const auto k = static_cast<std::size_t>(p.request.top_k);
  if (k > 0 && k < sorted.size()) kept.floor = sorted[k - 1];
  while (sorted.back() < kept.floor) sorted.pop_back();
  kept.floor = sorted.back();
  if (p.request.top_p >= 1) return kept;
  for (float score : sorted) kept.total += probability_mass(score, p.max);
  const double enough = p.request.top_p * static_cast<double>(kept.total);
  for (std::size_t i = 0; i < sorted.size() && static_cast<double>(kept.inside) < enough;) {
    kept.floor = sorted[i];
    for (; i < sorted.size() && sorted[i] == kept.floor; ++i) {
      kept.inside += probability_mass(sorted[i], p.max);
    }
  }
  return kept;
}

// A thread's part of what is not among the items.
cuda::Rest own_rest(const Problem& p) {
  const auto t = static_cast<unsigned>(cuda::threadIdx.x);
  return {p.max - static_cast<float>(t * 37 % cuda::kEmulatedThreads), t};
}

template <typename Items>
cuda::Filtered filtered(const Items& shared, const Problem& p) {
  cuda::Filtered result;
  cuda::emulated_block().run([&] {
    Items items = shared;  // as every thread has its own
    items.know_max(p.max);
    const cuda::Filtered own = items.n <= cuda::kFew
                                   ? cuda::filter_few(items, p.request, own_rest(p))
                                   : cuda::filter_many(items, p.request, p.max, own_rest(p));
    if (cuda::threadIdx.x == 0) result = own;
  });
  return result;
}

}  // namespace

TEST_CASE("a block's filters keep what sorting keeps") {
  for (int round = 0; round < 60; ++round) {
    const std::size_t n = round % 3 == 0   ? 1 + rng()() % cuda::kEmulatedThreads
                          : round % 3 == 1 ? 300 + rng()() % 1500
                                           : 1500 + rng()() % 1500;  // around the cached ones' end
    const Problem p = random_problem(n);
    const cuda::Filtered want = expected(p);
    std::vector<cuda::ScoredToken> cached = p.items;
    cached.resize(std::min<std::size_t>(n, cuda::Candidates::kCached));
    std::vector<unsigned long long> masses(cached.size(), 0xdeadbeef);
    const auto size = static_cast<int>(n);
    const cuda::Filtered from_candidates =
        filtered(cuda::Candidates{p.items.data(), size, cached.data(), masses.data(), 0}, p);
    const cuda::Filtered from_all = filtered(cuda::Everything{p.scores.data(), size, 0}, p);
    for (const cuda::Filtered& got : {from_candidates, from_all}) {
      CAPTURE(n, p.request.top_k, p.request.top_p, got.floor, want.floor);
      // Without a filter that cuts, "everything" may have any floor below the least score.
      const bool cuts = got.floor > -kInfinity;
      CHECK((got.floor == want.floor ||
             (!cuts && want.floor == *std::min_element(p.scores.begin(), p.scores.end()))));
      CHECK(got.total == want.total);
      CHECK(got.inside == want.inside);
      const bool asks = p.request.top_p < 1;
      CHECK(got.rest.ceiling == (asks ? p.max : -kInfinity));
      CHECK(got.rest.mass ==
            (asks ? cuda::kEmulatedThreads * (cuda::kEmulatedThreads - 1ull) / 2 : 0));
    }
  }
}

}  // namespace infemeral
