// Top-k and top-p of the CUDA backend, as one block computes them, on the host: against sorting,
// and how deep their candidates go against the scores themselves.
#include "tests/emulated_block.h"
// The device code after what stands in for the device.
#include "kernels/edges.cuh"
#include "kernels/filters.cuh"

#include <algorithm>
#include <catch2/catch.hpp>
#include <functional>
#include <limits>
#include <numeric>
#include <vector>

#include "engine/sampling.h"
#include "tests/test_random.h"

namespace infemeral {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Problem {
  std::vector<cuda::Candidate> items;
  std::vector<float> scores;
  cuda::RowRequest request = {};
  float max = -kInfinity;
  cuda::Rest rest = cuda::no_rest();
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
  if (p.request.top_k == 0 && rng()() % 4 != 0) {
    // Less than the cut can feel, about that, or more than the items can make up for.
    double total = 0;
    for (float score : p.scores) total += static_cast<double>(probability_mass(score, p.max));
    p.rest.mass = static_cast<unsigned long long>(total * std::exp(uniform(-20, 0)));
    const float least = *std::min_element(p.scores.begin(), p.scores.end());
    p.rest.ceiling = rng()() % 2 == 0 ? p.scores[rng()() % n] : least - 1;
  }
  return p;
}

// The same by sorting.
cuda::Filtered expected(const Problem& p) {
  std::vector<float> sorted = p.scores;
  std::sort(sorted.begin(), sorted.end(), std::greater<>());
  const auto k = static_cast<std::size_t>(p.request.top_k);
  const bool limited = k > 0 && k < sorted.size();
  const float least = limited ? sorted[k - 1] : -kInfinity;
  while (sorted.back() < least) sorted.pop_back();
  if (p.request.top_p >= 1) return {least, -kInfinity};
  std::uint64_t total = 0;
  for (float score : sorted) total += probability_mass(score, p.max);
  // Where the scores from it on have this share of a mass; nowhere: minus infinity.
  const auto end = [&](std::uint64_t mass) {
    std::uint64_t inside = 0;
    for (float score : sorted) {
      inside += probability_mass(score, p.max);
      if (static_cast<double>(inside) >= p.request.top_p * static_cast<double>(mass)) return score;
    }
    return -kInfinity;
  };
  const cuda::Filtered kept = {end(total + p.rest.mass), end(total)};
  return kept.floor > p.rest.ceiling ? kept : cuda::Filtered{kept.floor, kInfinity};
}

// What is said of every item.
template <typename Items>
std::vector<cuda::Kept> kept(const Items& shared, const Problem& p) {
  std::vector<cuda::Kept> said(p.scores.size());
  cuda::emulated_block().run([&] {
    Items items = shared;  // as every thread has its own
    if (items.n <= cuda::kFew) {
      const cuda::Few& few = cuda::share_few(items, p.request, p.max);
      for (int place = cuda::threadIdx.x; place < few.n; place += cuda::kEmulatedThreads) {
        said[static_cast<std::size_t>(few.items[place])] =
            cuda::kept_of_few(few, place, p.request, p.rest);
      }
    } else {
      items.know_max(p.max);
      const cuda::Filtered own = cuda::filter_many(items, p.request, p.max, p.rest);
      for (int i = cuda::threadIdx.x; i < items.n; i += cuda::kEmulatedThreads) {
        said[static_cast<std::size_t>(i)] = own.of(p.scores[static_cast<std::size_t>(i)]);
      }
    }
  });
  return said;
}

bool has_unknown(const std::vector<cuda::Kept>& said) {
  return std::count(said.begin(), said.end(), cuda::Kept::kUnknown) > 0;
}

}  // namespace

TEST_CASE("a block's filters keep what sorting keeps") {
  for (int round = 0; round < 150; ++round) {
    const std::size_t n = round % 3 == 0   ? 1 + rng()() % cuda::kEmulatedThreads
                          : round % 3 == 1 ? 300 + rng()() % 500    // few and many
                                           : 700 + rng()() % 1000;  // around the cached ones' end
    const Problem p = random_problem(n);
    const cuda::Filtered filtered = expected(p);
    std::vector<cuda::Kept> want;
    for (float score : p.scores) want.push_back(filtered.of(score));
    std::vector<cuda::Candidate> cached = p.items;
    cached.resize(std::min<std::size_t>(n, cuda::Candidates::kCached));
    std::vector<unsigned long long> masses(cached.size(), 0xdeadbeef);
    const auto size = static_cast<int>(n);
    const auto from_candidates =
        kept(cuda::Candidates{p.items.data(), size, cached.data(), masses.data(), 0}, p);
    const auto from_all = kept(cuda::Everything{p.scores.data(), size, 0}, p);
    for (const std::vector<cuda::Kept>& got : {from_candidates, from_all}) {
      CAPTURE(n, p.request.top_k, p.request.top_p, p.rest.mass, p.rest.ceiling);
      REQUIRE(has_unknown(got) == has_unknown(want));
      if (!has_unknown(want)) CHECK((got == want));
    }
  }
}

namespace {

// A block's part of a row: ends of intervals around and below `top`, some out of reach.
struct Part {
  float top = 0;
  std::vector<float> ends;
  std::uint32_t counts[cuda::kDigits] = {};
};
Part random_part() {
  Part part;
  part.top = normal(std::exp(uniform(-3, 6)));
  const float spread = std::exp(uniform(-2, 3)), above = uniform(0, 2);
  const std::size_t n = rng()() % (rng()() % 8 == 0 ? 4 : 1500);
  for (std::size_t i = 0; i < n; ++i) {
    part.ends.push_back(part.top + std::min(above, normal(spread) - 2 * spread));
    if (rng()() % 8 == 0) part.ends.back() = part.top - std::round(uniform(0, 30) * 8) / 8;
    ++part.counts[cuda::bin_of(part.top, part.ends.back())];
  }
  part.counts[cuda::kBins - 1] = 0;
  return part;
}

}  // namespace

TEST_CASE("what a block of top-p leaves out is within its share, and no more than it says") {
  int some = 0, none = 0, refused = 0;
  for (int round = 0; round < 300; ++round) {
    const Part part = random_part();
    const int limit = static_cast<int>(rng()() % 400);
    const float top_p = rng()() % 4 == 0 ? uniform(0.95f, 0.9999f) : uniform(0.05f, 0.95f);
    const bool known = rng()() % 4 == 0;
    cuda::gridDim.x = 1 + static_cast<int>(rng()() % 132);
    cuda::RowState state = {};
    int edge = -1;
    cuda::emulated_block().run([&] {
      const int own = cuda::nucleus_edge(part.counts, top_p, part.top, limit, known, state);
      if (cuda::threadIdx.x == 7) edge = own;
    });
    long double outside = 0, common = 0;  // in units of 2^-40 of exp(top)
    int inside = 0, n_outside = 0;
    float largest = -kInfinity;
    for (float end : part.ends) {
      const int bin = cuda::bin_of(part.top, end);
      const long double mass = std::exp(static_cast<long double>(end) - part.top) * 0x1p40L;
      if (bin == cuda::kBins - 1) continue;
      if (bin >= 16) common += mass;
      if (bin < edge) {
        ++inside;
      } else {
        ++n_outside;
        outside += mass;
        largest = std::max(largest, end);
      }
    }
    CAPTURE(part.top, part.ends.size(), limit, top_p, known, cuda::gridDim.x, edge, inside);
    if (edge == cuda::kBins) {
      ++refused;
      CHECK(inside > limit);
      continue;
    }
    CHECK(inside <= limit);
    CHECK(static_cast<long double>(state.rest_mass) >= outside);
    CHECK(static_cast<long double>(state.rest_mass) <= outside * 1.134L + n_outside);
    CHECK(static_cast<long double>(state.rest_mass) <=
          (0x1p40L / cuda::gridDim.x + common * 1.134L + 1500) * (known ? 2 : 0.125L) * 1.001L);
    CHECK((state.rest_mass > 0) == (n_outside > 0));
    (n_outside > 0 ? some : none) += 1;
    if (n_outside == 0) continue;
    const float ceiling = cuda::from_ordered(state.rest_ceiling);
    CHECK(ceiling >= largest);
    CHECK(ceiling <= largest + 0.1251f + std::fabs(part.top) * 1e-5f);
  }
  CAPTURE(some, none, refused);
  CHECK((some > 50 && none > 0 && refused > 10));
}

TEST_CASE("k lower ends are below top-k's edge, and fewer with one bin less") {
  for (int round = 0; round < 60; ++round) {
    const Part part = random_part();
    const auto k = static_cast<std::uint32_t>(1 + rng()() % 300);
    std::vector<std::uint32_t> sums(part.counts, part.counts + cuda::kDigits);
    int edge = -1;
    cuda::emulated_block().run([&] {
      const int own = cuda::top_k_edge(static_cast<int>(k), sums.data());
      if (cuda::threadIdx.x == 200) edge = own;
    });
    const auto below = [&](int e) { return std::accumulate(part.counts, part.counts + e, 0u); };
    CAPTURE(k, edge, part.ends.size());
    REQUIRE((edge >= 1 && edge < cuda::kBins));
    if (edge < cuda::kBins - 1) CHECK(below(edge) >= k);
    CHECK(below(edge - 1) < k);
  }
}

}  // namespace infemeral
