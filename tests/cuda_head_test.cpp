// The certified head on the device, kernel by kernel: rows and states in whole numbers, the
// intervals that their product proves, and that the chosen token is the full head's. Problems are
// those of tests/certified_head_test.cpp, up to 32 states at a time.
#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <cstring>
#include <functional>
#include <iostream>
#include <memory>
#include <utility>
#include <vector>

#include "engine/certified_head.h"
#include "kernels/device.h"
#include "tests/device_head.h"
#include "tests/head_problems.h"
#include "tests/test_random.h"

namespace infemeral {
namespace {

using cuda::Outcome;

// nullptr, and a line that says so, on a machine without a GPU.
std::unique_ptr<DeviceHead> open_head(std::size_t max_vocab = kMaxProblemVocab,
                                      std::size_t max_hidden = kMaxProblemHidden) {
  auto device = cuda::open_device();
  if (device.status().code() == absl::StatusCode::kUnavailable) {
    static bool said = false;
    if (!std::exchange(said, true)) {
      std::cout << "skipped: no GPU (" << device.status().message() << ")\n";
    }
    return nullptr;
  }
  INFO(device.status().message());
  REQUIRE(device.ok());
  return std::make_unique<DeviceHead>(*std::move(device), max_vocab, max_hidden);
}

// 1 to 32 states of the problem's kind, with every kind of sampling or with `params`.
Batch random_batch(const Kind& kind, Problem& p, const SamplingParams* params = nullptr) {
  // As often one, which has a kernel of its own, as any other number.
  const std::size_t n = random_index(3) == 0 ? 1 : 1 + random_index(cuda::kMaxRows);
  Batch batch;
  batch.history = random_history(p.vocab);
  for (std::size_t i = 0; i < n; ++i) {
    draw_state(kind, p);
    batch.states.insert(batch.states.end(), p.state.begin(), p.state.end());
    SampleRequest request{.position = random_index(1000)};
    request.params =
        params != nullptr ? *params : kSamplingKinds[random_index(kSamplingKinds.size())];
    request.params.seed = rng()();
    batch.requests.push_back(request);
  }
  for (SampleRequest& request : batch.requests) request.history = batch.history;
  return batch;
}

std::span<const float> state(const Problem& p, const Batch& batch, std::size_t i) {
  return std::span(batch.states).subspan(i * p.hidden, p.hidden);
}

struct Tally {
  std::size_t cases = 0, shown = 0, rescored = 0, known = 0, near_ties = 0;
};

// Every row's certified token is the full head's, and that is the Sampler's.
void compare(DeviceHead& head, const Problem& p, const Batch& batch, Tally& tally) {
  const Answers answers = head.run(batch);
  for (std::size_t i = 0; i < batch.requests.size(); ++i) {
    const SampleRequest& request = batch.requests[i];
    const cuda::RowResult &certified = answers.certified[i], &full = answers.full[i];
    const auto from = answers.logits.begin() + static_cast<std::ptrdiff_t>(i * head.score_stride());
    const std::vector<float> logits(from, from + static_cast<std::ptrdiff_t>(p.vocab));
    std::vector<float> scratch = logits;
    const std::int32_t expected = Sampler().sample(scratch, request);
    const auto& params = request.params;
    CAPTURE(p.vocab, p.hidden, batch.n(), i, params.temperature, params.top_k, params.top_p,
            params.min_p, params.repetition_penalty, params.seed, request.position, certified.token,
            full.token, expected);
    ++tally.cases;
    REQUIRE(full.outcome == Outcome::kToken);
    REQUIRE((full.token >= 0 && static_cast<std::size_t>(full.token) < p.vocab));
    if (full.token != expected) {
      REQUIRE(last_bits_decide(logits, request, expected, full.token));
      ++tally.near_ties;
    }
    const cuda::RowResult& known = answers.known[i];
    REQUIRE(known.outcome != Outcome::kNotFinite);
    if (known.outcome == Outcome::kToken) {
      ++tally.known;
      CHECK(known.token == full.token);
      CHECK(known.rows_rescored == 0);
    }
    REQUIRE(certified.outcome != Outcome::kNotFinite);
    if (certified.outcome != Outcome::kToken) continue;
    REQUIRE(answers.rows[i].covered == 1);
    ++tally.shown;
    tally.rescored += certified.rows_rescored;
    CHECK(certified.token == full.token);
  }
}

void compare_many(DeviceHead& head, const Kind& kind, std::size_t cases, Tally& tally) {
  while (tally.cases < cases) {
    Problem p = make_problem(kind);
    p.store();
    head.load(p);
    for (int i = 0; i < 6; ++i) compare(head, p, random_batch(kind, p), tally);
  }
  std::cout << kind.name << ": " << tally.shown << " of " << tally.cases << " certified, "
            << tally.rescored << " rows read in float16, " << tally.known
            << " told from all logits' candidates, " << tally.near_ties
            << " draws decided by last bits\n";
  // All but impossible: a draw that close, or a cut.
  CHECK(tally.near_ties <= tally.cases / 1000);
}

double exact_dot(const Problem& p, std::size_t row, std::span<const float> y) {
  long double sum = 0;  // products of binary16 and binary32 are exact in it
  for (std::size_t j = 0; j < p.hidden; ++j) sum += static_cast<long double>(p.row(row)[j]) * y[j];
  return static_cast<double>(sum);
}

// Whether the proof covers the state is not a matter of rounding.
bool borderline(std::span<const float> y, float largest_norm) {
  long double squares = 0;
  for (float x : y) squares += static_cast<long double>(x) * x;
  return std::fabs(std::sqrt(squares) * largest_norm / 0x1p100L - 1) < 0x1p-10L;
}

// Intervals of temperature 1 are those of the logits.
void check_intervals(DeviceHead& head, const Kind& kind, Problem& p) {
  const SamplingParams plain = {.temperature = 1};
  const Batch batch = random_batch(kind, p, &plain);
  const Answers answers = head.run(batch);
  const std::vector<float> centres = head.approximate(batch);
  const float largest_norm = head.largest_norm();
  std::vector<std::int16_t> v(p.hidden);
  for (std::size_t i = 0; i < batch.requests.size(); ++i) {
    const std::span<const float> y = state(p, batch, i);
    const bool covered = answers.rows[i].covered != 0;
    CAPTURE(p.vocab, p.hidden, batch.n(), i);
    if (!borderline(y, largest_norm)) {
      REQUIRE(covered == quantise_state(y, largest_norm, v).has_value());
    }
    if (!covered) continue;
    for (std::size_t t = 0; t < p.vocab; ++t) {
      const std::size_t at = i * head.score_stride() + t;
      const double exact = exact_dot(p, t, y);
      const float logit = answers.logits[at];
      CAPTURE(t, exact, logit, centres[at]);
      REQUIRE(answers.lower[at] <= std::min<double>(exact, logit));
      REQUIRE(answers.upper[at] >= std::max<double>(exact, logit));
      REQUIRE(answers.lower[at] <= centres[at]);
      REQUIRE(answers.upper[at] >= centres[at]);
    }
  }
}

}  // namespace

TEST_CASE("the device's certified head gives its full head's token: 100,000 random cases") {
  const auto head = open_head();
  if (head == nullptr) return;
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  Tally tally;
  compare_many(*head, kRandomKind, 100000, tally);
  // A proof that never succeeds would pass too.
  CHECK(tally.shown > 0.9 * static_cast<double>(tally.cases));
  CHECK(tally.rescored >= tally.shown);
  CHECK(tally.known > 0.95 * static_cast<double>(tally.cases));
}

TEST_CASE("the device's certified head gives its full head's token: every kind of difficulty") {
  const auto head = open_head();
  if (head == nullptr) return;
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  for (const Kind& kind : kDifficultKinds) {
    CAPTURE(kind.name);
    Tally tally;
    compare_many(*head, kind, 2000, tally);
    if (kind.covered) CHECK(tally.shown > tally.cases / 2);
  }
}

TEST_CASE(
    "shapes: one token, one column, whole and broken groups, rows that registers cannot hold") {
  const auto head = open_head(20000, 8192);
  if (head == nullptr) return;
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  const std::pair<std::size_t, std::size_t> shapes[] = {
      {1, 1},     {1, 4096},   {2, 3},      {127, 64},    {128, 63},   {129, 65},  {300, 256},
      {300, 257}, {1000, 576}, {513, 4096}, {20000, 100}, {257, 4100}, {200, 8192}};
  const SamplingParams greedy = {.temperature = 0};
  for (const auto& [vocab, hidden] : shapes) {
    CAPTURE(vocab, hidden);
    Problem p(vocab, hidden);
    for (float& w : p.weights) w = normal(1 / std::sqrt(static_cast<float>(hidden)));
    p.store();
    head->load(p);
    Tally tally;
    for (int i = 0; i < 4; ++i) compare(*head, p, random_batch(kRandomKind, p), tally);
    // Where many long states want the best token alone, an exact score comes before the threshold.
    for (int i = 0; i < 2; ++i) {
      Batch batch = random_batch(kRandomKind, p, &greedy);
      while (batch.n() < 8) batch = random_batch(kRandomKind, p, &greedy);
      compare(*head, p, batch, tally);
    }
    if (vocab * hidden < 1000000) check_intervals(*head, kRandomKind, p);
  }
}

TEST_CASE("the device's intervals hold the exact product and its float16 head's logit") {
  const auto head = open_head();
  if (head == nullptr) return;
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  std::vector<Kind> kinds = kDifficultKinds;
  kinds.push_back(kRandomKind);
  for (const Kind& kind : kinds) {
    CAPTURE(kind.name);
    for (int round = 0; round < 20; ++round) {
      Problem p = make_problem(kind);
      p.store();
      head->load(p);
      for (int i = 0; i < 2; ++i) check_intervals(*head, kind, p);
    }
  }
}

TEST_CASE("the device's rows are the engine's, and their bounds not below what float64 says") {
  const auto head = open_head();
  if (head == nullptr) return;
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  std::vector<Kind> kinds = kDifficultKinds;
  kinds.push_back(kRandomKind);
  for (int round = 0; round < 200; ++round) {
    const Kind& kind = kinds[static_cast<std::size_t>(round) % kinds.size()];
    Problem p = make_problem(kind);
    p.store();
    const bool broken = round % 10 == 9;  // an infinity, which no state is certifiable with
    const std::size_t bad = broken ? random_index(p.vocab) : p.vocab;
    if (broken) p.halves[bad * p.hidden + random_index(p.hidden)] = 0x7c00;
    head->load(p);
    const std::vector<RowBound> bounds = head->row_bounds();
    const std::vector<std::int8_t> copy = head->copied_rows();
    const std::size_t stride = copy.size() / bounds.size();
    std::vector<std::int8_t> q(p.hidden);
    float largest_norm = 0;
    for (std::size_t i = 0; i < bounds.size(); ++i) {
      const RowBound& bound = bounds[i];
      CAPTURE(kind.name, p.vocab, p.hidden, i, bound.scale, bound.error, bound.norm);
      std::vector<std::int8_t> expected(stride, 0);
      if (i >= p.vocab) {
        REQUIRE((bound.scale == 0 && bound.error == 0 && bound.norm == 0));
      } else if (i == bad) {
        REQUIRE(bound.norm == HUGE_VALF);
      } else {
        const std::span<const float> row(p.row(i), p.hidden);
        const RowBound engine = quantise_row(row, q);
        std::copy(q.begin(), q.end(), expected.begin());
        REQUIRE(bound.scale == engine.scale);
        long double error = 0, norm = 0;
        for (std::size_t j = 0; j < p.hidden; ++j) {
          const long double kept = static_cast<long double>(bound.scale) * q[j];
          error += (row[j] - kept) * (row[j] - kept);
          norm += static_cast<long double>(row[j]) * row[j];
        }
        REQUIRE(bound.error >= std::sqrt(error));
        REQUIRE(bound.norm >= std::sqrt(norm));
        REQUIRE(bound.error <= engine.error * (1 + 0x1p-22));
        REQUIRE(bound.norm <= engine.norm * (1 + 0x1p-22));
      }
      largest_norm = std::max(largest_norm, bound.norm);
      REQUIRE(std::memcmp(&copy[i * stride], expected.data(), stride) == 0);
    }
    REQUIRE(head->largest_norm() == largest_norm);
    if (!broken) continue;
    const Answers answers = head->run(random_batch(kind, p));
    for (const cuda::RowState& row : answers.rows) CHECK(row.covered == 0);
    for (const cuda::RowResult& r : answers.certified) CHECK(r.outcome == Outcome::kUncertain);
  }
}

TEST_CASE("the device's bound of a state holds, and is hardly above what it pays for") {
  const auto head = open_head(200, 8192);
  if (head == nullptr) return;
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  std::vector<Kind> kinds = kDifficultKinds;
  kinds.push_back(kRandomKind);
  for (int round = 0; round < 300; ++round) {
    const Kind& kind = kinds[static_cast<std::size_t>(round) % kinds.size()];
    // Long states too: those that a thread block cannot keep in registers.
    Problem p(20, round % 7 == 0 ? 3000 + random_index(5000) : 1 + random_index(300));
    for (float& w : p.weights) w = normal();
    kind.rows(p);
    p.store();
    head->load(p);
    Batch batch = random_batch(kind, p);
    while (batch.n() == 1) batch = random_batch(kind, p);
    const Answers answers = head->run(batch);
    for (std::size_t i = 0; i < batch.requests.size(); ++i) {
      if (answers.rows[i].covered == 0) continue;
      const std::span<const float> y = state(p, batch, i);
      std::vector<std::int16_t> unused(p.hidden);
      const auto engine = quantise_state(y, head->largest_norm(), unused);
      if (!engine) continue;  // check_intervals compares who is covered
      const StateBound& bound = answers.rows[i].bound;
      const std::vector<int> v = head->whole_state(batch.n(), static_cast<int>(i));
      CAPTURE(kind.name, p.hidden, batch.n(), i);
      REQUIRE(bound.scale == engine->scale);
      const long double t = bound.scale, u = 0x1p-24L, n = static_cast<long double>(p.hidden);
      long double error = 0, norm = 0, squares = 0;
      std::vector<long double> sizes;  // |t v|
      for (std::size_t j = 0; j < v.size(); ++j) {
        if (j >= p.hidden) {
          REQUIRE(v[j] == 0);
          continue;
        }
        REQUIRE(std::abs(v[j]) <= kStateMax);
        error += (y[j] - t * v[j]) * (y[j] - t * v[j]);
        norm += static_cast<long double>(y[j]) * y[j];
        squares += t * v[j] * t * v[j];
        sizes.push_back(t * std::abs(v[j]));
      }
      // A factor must reach what it pays for, and pay little more: engine/certified_bound.h's slack
      // of 2^-12, and 2^-14 for sums in float32.
      const auto pays = [](float factor, long double what) {
        return factor >= what && factor <= what * (1 + 0x1p-11L);
      };
      REQUIRE(pays(bound.norm_factor, std::sqrt(error) + n * u / (1 - n * u) * std::sqrt(norm) +
                                          9 * u * std::sqrt(squares)));
      // Outliers are the largest values, however many.
      std::sort(sizes.begin(), sizes.end(), std::greater<>());
      long double outliers = 0;
      bool holds = false;
      for (std::size_t k = 0; k <= sizes.size() && !holds; ++k) {
        long double rest = 0;
        for (std::size_t j = k; j < sizes.size(); ++j) rest += sizes[j] * sizes[j];
        holds = pays(bound.scale_factor, outliers / 2) && pays(bound.error_factor, std::sqrt(rest));
        if (k < sizes.size()) outliers += sizes[k];
      }
      CAPTURE(bound.scale_factor, bound.error_factor);
      REQUIRE(holds);
    }
  }
}

}  // namespace infemeral
