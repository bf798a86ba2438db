// The certified head against the full one, and its intervals against float64 and against sums in
// the worst orders. Heads are small, so that there can be many.
#include "engine/certified_head.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "cpu/int8_head.h"
#include "cpu/simd/dispatch.h"
#include "engine/float16.h"
#include "engine/sampling.h"
#include "tests/head_problems.h"

namespace infemeral {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

Matrix matrix(const Problem& p) {
  return {simd::Format::kF16, reinterpret_cast<const std::byte*>(p.halves.data()), p.vocab,
          p.hidden};
}

// As several threads bring them: any block may come first, from any worker.
void observe(CertifiedSampler& sampler, const SampleRequest& request,
             const std::vector<float>& lower, const std::vector<float>& upper) {
  constexpr std::size_t kBlock = CertifiedSampler::kBlock;
  const std::size_t workers = 1 + random_index(4);
  sampler.start(request, lower.size(), workers);
  std::vector<std::size_t> blocks;
  for (std::size_t first = 0; first < lower.size(); first += kBlock) blocks.push_back(first);
  std::shuffle(blocks.begin(), blocks.end(), rng());
  for (std::size_t first : blocks) {
    const std::size_t n = std::min(kBlock, lower.size() - first);
    std::vector<float> low(&lower[first], &lower[first] + n),
        high(&upper[first], &upper[first] + n);
    sampler.observe(random_index(workers), first, low, high);
  }
}

// One head on one instruction set, as the CPU backend uses it.
class Heads {
 public:
  Heads(const Problem& p, const simd::Kernels& kernels)
      : p_(p), kernels_(kernels), pool_(1), int8_(matrix(p), kernels, pool_) {
    int8_.load({const_cast<float*>(p.state.data()), p.hidden}, 1);
    lower.assign(p.vocab, kNan);
    upper.assign(p.vocab, kNan);
    int8_.intervals([&](std::size_t, std::size_t worker, std::size_t first, std::span<float> low,
                        std::span<float> high) {
      REQUIRE((worker == 0 && low.size() == high.size()));
      std::copy(low.begin(), low.end(), lower.begin() + static_cast<std::ptrdiff_t>(first));
      std::copy(high.begin(), high.end(), upper.begin() + static_cast<std::ptrdiff_t>(first));
    });
    logits.assign(p.vocab, kNan);
    multiply(matrix(p), logits.data());
  }
  bool covered() const { return int8_.covers(0); }

  std::int32_t full(const SampleRequest& request) {
    std::vector<float> scratch = logits;
    return sampler_.sample(scratch, request);
  }
  std::optional<std::int32_t> certified(const SampleRequest& request, HeadCounters& counters) {
    observe(certified_, request, lower, upper);
    const auto rescore = [&](std::span<Candidate> candidates) {
      for (Candidate& c : candidates) {
        const Matrix row = matrix(p_).row(static_cast<std::size_t>(c.id));
        multiply(row, &c.score);
      }
    };
    return certified_.finish(rescore, counters);
  }

  std::vector<float> lower, upper, logits;

 private:
  void multiply(const Matrix& w, float* out) {
    const Rows x{const_cast<float*>(p_.state.data()), p_.hidden};
    linear_rows(kernels_, {.weight = &w, .out = {out, w.rows}}, x, 1, 0, w.rows);
  }

  const Problem& p_;
  const simd::Kernels& kernels_;
  ThreadPool pool_;
  Int8Head int8_;
  Sampler sampler_;
  CertifiedSampler certified_;
};

struct Tally {
  std::size_t cases = 0, shown = 0, wrong = 0;
  HeadCounters counters;
};

// Every kind of sampling on one problem.
void compare(Problem& p, const simd::Kernels& kernels, Tally& tally) {
  p.store();
  Heads heads(p, kernels);
  const std::vector<std::int32_t> history = random_history(p.vocab);
  for (const SamplingParams& params : kSamplingKinds) {
    SampleRequest request{.params = params, .position = random_index(1000), .history = history};
    request.params.seed = rng()();
    ++tally.cases;
    if (!heads.covered()) continue;  // the full head is run
    const HeadCounters before = tally.counters;
    const std::optional<std::int32_t> token = heads.certified(request, tally.counters);
    if (random_index(8) == 0) {  // in another order, from other workers
      HeadCounters counters;
      REQUIRE(heads.certified(request, counters) == token);
      REQUIRE(counters.rows_rescored == tally.counters.rows_rescored - before.rows_rescored);
      REQUIRE(counters.widenings == tally.counters.widenings - before.widenings);
    }
    if (!token) continue;
    ++tally.shown;
    if (*token == heads.full(request)) continue;
    ++tally.wrong;
    CAPTURE(kernels.name, p.vocab, p.hidden, params.temperature, params.top_k, params.top_p,
            params.min_p, params.repetition_penalty, *token, heads.full(request));
    CHECK(false);
  }
}

double exact_dot(const Problem& p, std::size_t row) {
  long double sum = 0;  // products of binary16 and binary32 are exact in it
  for (std::size_t j = 0; j < p.hidden; ++j) {
    sum += static_cast<long double>(p.row(row)[j]) * p.state[j];
  }
  return static_cast<double>(sum);
}

// The same sum in float32 in orders that nobody would choose: as it lies, backwards, largest
// products first, smallest first, positive before negative; products rounded or fused.
std::vector<float> adversarial_sums(const float* w, const float* y, std::size_t n) {
  std::vector<std::size_t> order(n);
  for (std::size_t j = 0; j < n; ++j) order[j] = j;
  const auto product = [&](std::size_t j) { return static_cast<double>(w[j]) * y[j]; };
  const std::function<bool(std::size_t, std::size_t)> orders[] = {
      std::less<>(), std::greater<>(),
      [&](auto a, auto b) { return std::fabs(product(a)) > std::fabs(product(b)); },
      [&](auto a, auto b) { return std::fabs(product(a)) < std::fabs(product(b)); },
      [&](auto a, auto b) { return product(a) > product(b); }};
  std::vector<float> sums;
  for (const auto& before : orders) {
    std::sort(order.begin(), order.end(), before);
    float rounded = 0, fused = 0;
    for (std::size_t j : order) {
      rounded += w[j] * y[j];
      fused = std::fmaf(w[j], y[j], fused);
    }
    sums.push_back(rounded);
    sums.push_back(fused);
  }
  return sums;
}

}  // namespace

TEST_CASE("the certified head gives the full head's token: 100,000 random cases") {
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  for (const simd::Kernels* kernels : simd::available_kernels()) {
    Tally tally;
    while (tally.cases < 100000) {
      Problem p = make_problem(kRandomKind);
      compare(p, *kernels, tally);
    }
    CHECK(tally.wrong == 0);
    // A proof that never succeeds would pass too.
    CHECK(tally.shown > 0.9 * static_cast<double>(tally.cases));
    CHECK(tally.counters.rows_rescored > 0);
  }
}

TEST_CASE("the certified head gives the full head's token: every kind of difficulty") {
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  for (const simd::Kernels* kernels : simd::available_kernels()) {
    for (const Kind& kind : kDifficultKinds) {
      CAPTURE(kind.name);
      Tally tally;
      while (tally.cases < 2000) {
        Problem p = make_problem(kind);
        compare(p, *kernels, tally);
      }
      CHECK(tally.wrong == 0);
      if (kind.covered) CHECK(tally.shown > tally.cases / 2);
    }
  }
}

TEST_CASE("intervals hold the exact product and every float32 sum of it") {
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  std::vector<Kind> kinds = kDifficultKinds;
  kinds.push_back(kRandomKind);
  for (const Kind& kind : kinds) {
    CAPTURE(kind.name);
    for (int round = 0; round < 20; ++round) {
      Problem p = make_problem(kind);
      p.store();
      for (const simd::Kernels* kernels : simd::available_kernels()) {
        const Heads heads(p, *kernels);
        if (!heads.covered()) continue;
        for (std::size_t i = 0; i < p.vocab; ++i) {
          const double exact = exact_dot(p, i);
          std::vector<float> sums = adversarial_sums(p.row(i), p.state.data(), p.hidden);
          sums.push_back(heads.logits[i]);
          const auto [least, most] = std::minmax_element(sums.begin(), sums.end());
          CAPTURE(kernels->name, p.hidden, exact, *least, *most);
          REQUIRE(heads.lower[i] <= std::min<double>(exact, *least));
          REQUIRE(heads.upper[i] >= std::max<double>(exact, *most));
        }
      }
    }
  }
}

TEST_CASE("intervals hold sums whose roundings all go the same way") {
  // Rows and states that are whole numbers times their scales: nothing but the rounding of the sum
  // is left in the interval's width.
  for (std::size_t n : {2, 5, 33, 64, 300, 4096}) {
    std::vector<std::int8_t> q(n);
    std::vector<std::int16_t> v(n);
    const RowBound row = quantise_row(std::vector<float>(n, 127), q);
    const auto state =
        quantise_state(std::vector<float>(n, static_cast<float>(kStateMax)), row.norm, v);
    REQUIRE(state);
    CHECK((row.scale == 1 && row.error == 0 && state->scale == 1 && state->scale_factor == 0));

    // A machine that makes every product and every partial sum too large by half a unit.
    const double u = 0x1p-24, product = 127.0 * kStateMax;
    double sum = 0;
    std::int64_t dot = 0;
    for (std::size_t j = 0; j < n; ++j) {
      sum = (sum + product * (1 + u)) * (j == 0 ? 1 : 1 + u);
      dot += q[j] * v[j];
    }
    const double exact = product * static_cast<double>(n);
    CHECK(static_cast<double>(dot) == exact);
    const float centre = approximate_logit(dot, row, *state), radius = logit_radius(row, *state);
    CHECK(centre + radius >= sum);
    CHECK(centre - radius <= exact - (sum - exact));
    // And not an interval that would hold anything.
    CHECK(radius <= 1.01 * static_cast<double>(n + 9) * u * exact);
  }
}

TEST_CASE("intervals of very short rows, where nothing but roundings is left, hold the product") {
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  std::int8_t q[2];
  std::int16_t v[2];
  for (int round = 0; round < 200000; ++round) {
    const std::size_t n = 1 + random_index(2);
    float w[2], y[2];
    double exact = 0;
    std::int64_t dot = 0;
    for (std::size_t j = 0; j < n; ++j) {
      w[j] = f16_to_f32(f32_to_f16(normal()));
      y[j] = normal();
      if (y[j] == 0) y[j] = 1;  // it happens, and an all but zero state is not covered
      exact += static_cast<double>(w[j]) * y[j];  // two exact products, one rounding of 2^-53
    }
    const RowBound row = quantise_row({w, n}, {q, n});
    const auto state = quantise_state({y, n}, row.norm, {v, n});
    REQUIRE(state);
    for (std::size_t j = 0; j < n; ++j) dot += q[j] * v[j];
    const float centre = approximate_logit(dot, row, *state), radius = logit_radius(row, *state);
    float sum = w[0] * y[0];
    if (n == 2) sum += w[1] * y[1];
    REQUIRE(centre - radius <= std::min<double>(exact, sum));
    REQUIRE(centre + radius >= std::max<double>(exact, sum));
  }
}

TEST_CASE("a row's error and norm are not below what float64 says, nor far above") {
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  for (int round = 0; round < 2000; ++round) {
    const std::size_t n = 1 + random_index(300);
    std::vector<float> row(n);
    const float scale = std::exp2(uniform(-24, 10));
    for (float& w : row) w = f16_to_f32(f32_to_f16(normal(scale)));
    std::vector<std::int8_t> q(n, 99);
    const RowBound bound = quantise_row(row, q);
    long double error = 0, norm = 0;
    for (std::size_t j = 0; j < n; ++j) {
      const long double kept = static_cast<long double>(bound.scale) * q[j];
      error += (row[j] - kept) * (row[j] - kept);
      norm += static_cast<long double>(row[j]) * row[j];
      REQUIRE(std::fabs(row[j] - kept) <= 0.5001L * bound.scale);
      REQUIRE(q[j] >= -127);
    }
    REQUIRE(bound.error >= std::sqrt(error));
    REQUIRE(bound.norm >= std::sqrt(norm));
    REQUIRE(bound.error <= std::sqrt(error) * (1 + 0x1p-22L));
    REQUIRE(bound.norm <= std::sqrt(norm) * (1 + 0x1p-22L));
  }
}

TEST_CASE("rows rounded in vectors: the same whole numbers, and bounds that are true and near") {
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  for (const simd::Kernels* kernels : simd::available_kernels()) {
    for (int round = 0; round < 600; ++round) {
      const std::size_t n = 1 + random_index(round % 10 == 0 ? 5000 : 300);
      std::vector<std::uint16_t> halves(n);
      std::vector<float> row(n);
      const float scale = std::exp2(uniform(-24, 13));
      for (std::size_t j = 0; j < n; ++j) {
        halves[j] = f32_to_f16(std::clamp(normal(scale), -65504.0f, 65504.0f));
        row[j] = f16_to_f32(halves[j]);
      }
      std::vector<std::int8_t> expected(n), q(n + 1, 99);
      const RowBound reference = quantise_row(row, expected);
      double squares = -1;
      const float largest = kernels->row_range(halves.data(), n, &squares);
      CAPTURE(kernels->name, n, scale);
      if (largest == 0) {
        REQUIRE((reference.scale == 0 && squares == 0));
        continue;
      }
      REQUIRE(largest / static_cast<float>(kRowMax) == reference.scale);
      const double error = kernels->round_row(halves.data(), n, reference.scale, q.data());
      REQUIRE(std::equal(expected.begin(), expected.end(), q.begin()));
      REQUIRE(q[n] == 99);
      const RowBound bound = row_bound(reference.scale, squares, error);
      long double true_error = 0, true_norm = 0;
      for (std::size_t j = 0; j < n; ++j) {
        const long double kept = static_cast<long double>(reference.scale) * q[j];
        true_error += (row[j] - kept) * (row[j] - kept);
        true_norm += static_cast<long double>(row[j]) * row[j];
      }
      REQUIRE(bound.error >= std::sqrt(true_error));
      REQUIRE(bound.norm >= std::sqrt(true_norm));
      REQUIRE(bound.norm <= std::sqrt(true_norm) * (1 + 0x1p-14L));
      REQUIRE(bound.error <= std::sqrt(true_error) * (1 + 0x1p-14L) + 0x1p-21L * bound.norm);
    }
    for (std::uint16_t bad : {0x7c00, 0xfc00, 0x7e01}) {  // infinities, NaN
      std::vector<std::uint16_t> halves(1 + random_index(100), 0x3c00);
      halves[random_index(halves.size())] = bad;
      double squares = 0;
      kernels->row_range(halves.data(), halves.size(), &squares);
      REQUIRE(!std::isfinite(squares));
    }
  }
}

TEST_CASE("what the proof does not cover is refused, not guessed") {
  std::vector<std::int8_t> q(3, 99);
  for (float bad : {kNan, HUGE_VALF, -HUGE_VALF}) {
    const RowBound row = quantise_row(std::vector<float>{1, bad, 2}, q);
    CHECK(row.norm == HUGE_VALF);
    CHECK(q == std::vector<std::int8_t>{0, 0, 0});
  }
  std::vector<std::int16_t> v(3);
  const std::vector<float> state = {1, -2, 3};
  CHECK(quantise_state(state, 10, v));
  CHECK(!quantise_state(state, HUGE_VALF, v));
  CHECK(!quantise_state(state, kNan, v));
  CHECK(!quantise_state(state, 0x1p100f, v));
  for (float bad : {kNan, HUGE_VALF, 3e38f}) {
    CHECK(!quantise_state(std::vector<float>{1, bad, 2}, 1e4f, v));
  }
  CHECK(!quantise_state(std::vector<float>{0, 0x1p-61f, 0}, 10, v));
  std::vector<float> long_state((1u << 20) + 1, 1.0f);
  std::vector<std::int16_t> long_v(long_state.size());
  CHECK(!quantise_state(long_state, 10, long_v));

  // Scores that float32 could not hold.
  CertifiedSampler sampler;
  HeadCounters counters;
  const std::vector<float> ends = {1, 2};
  const auto rescore = [](std::span<Candidate>) { FAIL("nothing is to be rescored"); };
  for (const SamplingParams& params :
       {SamplingParams{.temperature = 5e-5f}, SamplingParams{.repetition_penalty = 1e-30f}}) {
    observe(sampler, {.params = params}, ends, ends);
    CHECK(!sampler.finish(rescore, counters));
  }
}

TEST_CASE("the state's whole numbers are two signed bytes, v = 256 * high + low") {
  for (std::int32_t v = -kStateMax; v <= kStateMax; ++v) {
    const std::int32_t low = ((v + 128) & 255) - 128, high = (v - low) / 256;
    REQUIRE(256 * high + low == v);
    REQUIRE((high >= -128 && high <= 127));
  }
}

TEST_CASE("dot_i8 is exact on every path, at the ends of the ranges too") {
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  for (const simd::Kernels* kernels : simd::available_kernels()) {
    for (std::size_t k :
         {1, 2, 15, 16, 17, 31, 33, 63, 511, 512, 513, 576, 1500, 8192, 8199, 70001}) {
      for (bool extreme : {false, true}) {
        CAPTURE(kernels->name, k, extreme);
        const std::size_t n = 1 + random_index(5);
        const std::size_t m = 1 + random_index(4), ldw = k + random_index(3);
        std::vector<std::int8_t> w((n - 1) * ldw + k), high(m * k), low(m * k);
        std::vector<std::int16_t> y(m * k);
        const int sign = random_index(2) == 0 ? 1 : -1;
        for (auto& x : w) x = static_cast<std::int8_t>(extreme ? 127 : random_index(255) - 127);
        for (auto& x : y) {
          x = static_cast<std::int16_t>(extreme ? sign * kStateMax
                                                : static_cast<int>(random_index(65279)) - 32639);
        }
        std::vector<simd::WholeState> states(m);
        for (std::size_t s = 0; s < m; ++s) {
          states[s] = {&y[s * k], &high[s * k], &low[s * k], 0};
          for (std::size_t i = s * k; i < (s + 1) * k; ++i) {
            low[i] = static_cast<std::int8_t>(((y[i] + 128) & 255) - 128);
            high[i] = static_cast<std::int8_t>((y[i] - low[i]) / 256);
            states[s].sum += y[i];
          }
        }
        const std::size_t ldo = n + 2;
        std::vector<std::int64_t> out(m * ldo, 42);
        kernels->dot_i8({.w = w.data(),
                         .ldw = ldw,
                         .states = states.data(),
                         .out = out.data(),
                         .ldo = ldo,
                         .m = m,
                         .n = n,
                         .k = k});
        for (std::size_t s = 0; s < m; ++s) {
          for (std::size_t r = 0; r < n; ++r) {
            std::int64_t sum = 0;
            for (std::size_t i = 0; i < k; ++i) sum += std::int64_t{w[r * ldw + i]} * y[s * k + i];
            REQUIRE(out[s * ldo + r] == sum);
          }
          REQUIRE((out[s * ldo + n] == 42 && out[s * ldo + n + 1] == 42));
        }
      }
    }
  }
}

TEST_CASE("a flat row is left to the full head: rescoring all of it would cost more") {
  Problem p(2000, 8);
  for (std::size_t i = 0; i < p.vocab; ++i) {
    for (std::size_t j = 0; j < p.hidden; ++j) p.row(i)[j] = 1;
  }
  for (float& y : p.state) y = 1;
  p.store();
  Heads heads(p, *simd::available_kernels().front());
  HeadCounters counters;
  CHECK(!heads.certified({}, counters));
  CHECK(counters.rows_rescored == 0);
}

TEST_CASE("head modes have names") {
  for (HeadMode mode : {HeadMode::kCertified, HeadMode::kFull, HeadMode::kInt8}) {
    CHECK(parse_head_mode(head_mode_name(mode)) == mode);
  }
  CHECK(!parse_head_mode("best"));
}

}  // namespace infemeral
