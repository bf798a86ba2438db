// What every client backend must do, run over all that were built; and, where there are two, that
// they give the same tokens. The CUDA half needs a GPU and says so when there is none:
//
//   backend_parity_test "~*- Cuda"     the CPU alone
//   backend_parity_test "*- Cuda"      CUDA
#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <cstring>
#include <iostream>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "engine/float16.h"
#include "engine/subset_head.h"
#include "engine/token_subset.h"
#include "tests/backends.h"
#include "tests/client_fixture.h"
#include "tests/head_problems.h"
#include "tests/test_random.h"

namespace infemeral {
namespace {

std::vector<std::int32_t> random_ids(std::size_t n, std::size_t vocab) {
  std::vector<std::int32_t> ids(n);
  for (std::int32_t& id : ids) id = static_cast<std::int32_t>(random_index(vocab));
  return ids;
}

// Returned rows and what is asked about them. Histories are shared.
struct Batch {
  WireDtype dtype;
  std::size_t row_bytes;
  std::vector<std::int32_t> history;
  std::vector<std::byte> bytes;
  std::vector<SampleRequest> requests;

  std::span<const std::byte> rows(std::size_t first, std::size_t n = 1) const {
    return std::span(bytes).subspan(first * row_bytes, n * row_bytes);
  }
  std::span<const SampleRequest> asked(std::size_t first, std::size_t n = 1) const {
    return std::span(requests).subspan(first, n);
  }
};

// Rows from flat to peaked, with every kind of sampling in turn.
Batch random_batch(const Client& client, WireDtype dtype, std::size_t n) {
  Batch batch{dtype, wire_row_bytes(dtype, client.hidden), random_history(client.vocab), {}, {}};
  for (std::size_t i = 0; i < n; ++i) {
    std::vector<double> state = random_row(client.hidden);
    const double scale = uniform(0.05f, 1);
    for (double& x : state) x *= scale;
    const std::vector<std::byte> row = encode(dtype, state);
    batch.bytes.insert(batch.bytes.end(), row.begin(), row.end());
    batch.requests.push_back({kSamplingKinds[i % kSamplingKinds.size()], random_index(1000), {}});
    batch.requests.back().params.seed = rng()();
  }
  return batch;
}

std::vector<std::int32_t> next_tokens(ClientBackend& backend, const Batch& batch, std::size_t first,
                                      std::size_t n) {
  std::vector<SampleRequest> requests(batch.asked(first, n).begin(), batch.asked(first, n).end());
  for (SampleRequest& request : requests) request.history = batch.history;
  std::vector<std::int32_t> tokens(n, -1);
  PhaseTimes times;
  const absl::Status status =
      backend.next_tokens(batch.rows(first, n), batch.dtype, requests, tokens, times);
  INFO(status.message());
  REQUIRE(status.ok());
  if (n > 0) CHECK(times.sum() > 0);
  CHECK(times.embed_ms + times.cloak_ms == 0);
  return tokens;
}

std::vector<float> logits_of(ClientBackend& backend, std::span<const std::byte> row,
                             WireDtype dtype) {
  std::vector<float> logits(backend.vocab_size(), std::numeric_limits<float>::quiet_NaN());
  REQUIRE(backend.logits(row, dtype, logits).ok());
  return logits;
}

std::vector<std::byte> embed(ClientBackend& backend, std::span<const std::int32_t> ids,
                             WireDtype dtype) {
  std::vector<std::byte> out(ids.size() * wire_row_bytes(dtype, backend.hidden_size()),
                             std::byte{0xa5});
  PhaseTimes times;
  REQUIRE(backend.embed(ids, dtype, out, times).ok());
  return out;
}
std::vector<std::byte> embed(ClientBackend& backend, std::int32_t id, WireDtype dtype) {
  return embed(backend, std::span(&id, 1), dtype);
}

std::int32_t sampled(const std::vector<float>& logits, const SampleRequest& request) {
  std::vector<float> scratch = logits;
  return Sampler().sample(scratch, request);
}

// The token must be the Sampler's, but for last bits where the backend has its own logarithm.
template <typename Backend>
void check_sampled(std::int32_t token, const std::vector<float>& logits,
                   const SampleRequest& request) {
  const std::int32_t expected = sampled(logits, request);
  if (token == expected) return;
  CAPTURE(token, expected, request.params.temperature, request.params.top_k, request.params.top_p,
          request.params.min_p, request.params.seed, request.position);
  REQUIRE_FALSE(Backend::kHostLibrary);
  REQUIRE(token >= 0);
  REQUIRE(last_bits_decide(logits, request, expected, token));
  std::cout << "near-tie of the draw: token " << token << " for " << expected << ", temperature "
            << request.params.temperature << "\n";
}

}  // namespace

TEMPLATE_TEST_CASE("embed gives the rows of the table times Q", "", INFEMERAL_BACKENDS) {
  if (!available<TestType>()) return;
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  const std::size_t some = 70 + random_index(80);
  for (std::size_t hidden : {std::size_t{1}, some / 2 * 2, some / 2 * 2 + 1, std::size_t{577}}) {
    const Client client({.hidden = hidden, .tied = random_index(2) == 0});
    const auto backend = load<TestType>(client);
    CHECK_FALSE(backend->name().empty());
    CHECK(backend->hidden_size() == client.hidden);
    CHECK(backend->vocab_size() == client.vocab);
    for (std::size_t n : {1, 5, 32, 33, 300}) {
      check_embed(client, *backend, random_ids(n, client.vocab));
    }
  }
  // Sums as long as a large model's, with the roundings of as many steps.
  const Client wide({.hidden = 1900 + random_index(200), .vocab = 64});
  const auto backend = load<TestType>(wide);
  for (std::size_t n : {1, 9, 40}) {
    check_embed(wide, *backend, random_ids(n, wide.vocab));
  }
}

TEMPLATE_TEST_CASE("logits undo the cloak; on f32 better than the float16 matrix could", "",
                   INFEMERAL_BACKENDS) {
  if (!available<TestType>()) return;
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  for (HeadMode head : {HeadMode::kCertified, HeadMode::kFull}) {
    for (bool tied : {false, true}) {
      for (CloakMode cloak : {CloakMode::kLazy, CloakMode::kEager}) {
        const Client client({.hidden = 96 + random_index(60), .tied = tied, .cloak = cloak});
        check_logits(client, *load<TestType>(client, head), TestType::kUnit);
      }
    }
  }
}

TEMPLATE_TEST_CASE("tokens are sampled from the logits; certified and full heads agree", "",
                   INFEMERAL_BACKENDS) {
  if (!available<TestType>()) return;
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  const std::size_t rounds = 30, n = rounds * kSamplingKinds.size();
  for (std::size_t vocab : {500, 3000}) {
    const Client client({.hidden = 100 + random_index(60), .vocab = vocab});
    const auto certified = load<TestType>(client), full = load<TestType>(client, HeadMode::kFull);
    for (WireDtype dtype : kAllWires) {
      const Batch batch = random_batch(client, dtype, n);
      for (std::size_t i = 0; i < n; ++i) {
        SampleRequest request = batch.requests[i];
        request.history = batch.history;
        CAPTURE(vocab, client.hidden, wire_dtype_name(dtype).data(), i);
        const std::vector<float> logits = logits_of(*full, batch.rows(i), dtype);
        const std::vector<float> same = logits_of(*certified, batch.rows(i), dtype);
        REQUIRE(std::memcmp(logits.data(), same.data(), logits.size() * sizeof(float)) == 0);
        const std::int32_t token = next_tokens(*full, batch, i, 1)[0];
        check_sampled<TestType>(token, logits, request);
        REQUIRE(next_tokens(*certified, batch, i, 1)[0] == token);
      }
    }
    // A proof that never succeeds would pass too.
    const HeadCounters counters = certified->head_counters();
    CHECK(counters.tokens == n * std::size(kAllWires));
    CHECK(counters.full_passes < counters.tokens / 4);
    CHECK(counters.rows_rescored >= counters.tokens - counters.full_passes);
    CHECK(full->head_counters().tokens == 0);
  }
}

TEMPLATE_TEST_CASE("many rows at once give what each gives alone", "", INFEMERAL_BACKENDS) {
  if (!available<TestType>()) return;
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  constexpr std::size_t kMost = 37;
  const Client client({.hidden = 65 + random_index(100), .vocab = 1000});
  const std::vector<std::int32_t> ids = random_ids(kMost, client.vocab);
  for (HeadMode head : {HeadMode::kCertified, HeadMode::kFull, HeadMode::kInt8}) {
    const auto backend = load<TestType>(client, head);
    for (WireDtype dtype : kAllWires) {
      const Batch batch = random_batch(client, dtype, kMost);
      std::vector<std::int32_t> alone;
      std::vector<std::byte> embedded;
      for (std::size_t i = 0; i < kMost; ++i) {
        alone.push_back(next_tokens(*backend, batch, i, 1)[0]);
        const std::vector<std::byte> row = embed(*backend, ids[i], dtype);
        embedded.insert(embedded.end(), row.begin(), row.end());
      }
      for (std::size_t n : {1, 2, 4, 5, 8, 9, 16, 17, 31, 32, 33, 37}) {
        CAPTURE(head_mode_name(head).data(), wire_dtype_name(dtype).data(), n, client.hidden);
        const std::size_t first = random_index(kMost - n + 1);
        const std::vector<std::int32_t> tokens = next_tokens(*backend, batch, first, n);
        for (std::size_t i = 0; i < n; ++i) {
          CAPTURE(first, i);
          CHECK(tokens[i] == alone[first + i]);
        }
        const auto rows = embed(*backend, std::span(ids).subspan(first, n), dtype);
        CHECK(std::memcmp(rows.data(), embedded.data() + first * batch.row_bytes, rows.size()) ==
              0);
      }
    }
  }
}

TEMPLATE_TEST_CASE("the repetition penalty is that of the history, whatever came before", "",
                   INFEMERAL_BACKENDS) {
  if (!available<TestType>()) return;
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  const Client client({.hidden = 90, .vocab = 400});
  for (HeadMode head : {HeadMode::kCertified, HeadMode::kFull}) {
    const auto backend = load<TestType>(client, head);
    const std::vector<std::byte> row = encode(WireDtype::kF32, random_row(client.hidden));
    const std::vector<float> logits = logits_of(*backend, row, WireDtype::kF32);
    // Greedy, with a penalty that forbids: every token of the history falls behind the next best.
    std::vector<std::int32_t> history;
    for (int i = 0; i < 20; ++i) {
      const SampleRequest request{.params = {.repetition_penalty = 100}, .history = history};
      const SampleRequest plain{.history = history};
      std::int32_t tokens[2] = {-1, -1};
      PhaseTimes times;
      for (const SampleRequest* asked : {&request, &plain}) {
        std::int32_t& token = tokens[asked == &plain];
        REQUIRE(backend->next_tokens(row, WireDtype::kF32, {asked, 1}, {&token, 1}, times).ok());
        REQUIRE(token == sampled(logits, *asked));
      }
      REQUIRE(std::find(history.begin(), history.end(), tokens[0]) == history.end());
      history.push_back(tokens[0]);
      REQUIRE(tokens[1] == history[0]);
    }
  }
}

TEMPLATE_TEST_CASE("what the proof does not cover goes to the full head, and is counted", "",
                   INFEMERAL_BACKENDS) {
  if (!available<TestType>()) return;
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  const Client client({.hidden = 128, .vocab = 500});
  const auto certified = load<TestType>(client), full = load<TestType>(client, HeadMode::kFull),
             int8 = load<TestType>(client, HeadMode::kInt8);
  const std::size_t rows = 3;
  std::vector<std::byte> bytes;
  std::vector<std::vector<float>> logits;
  for (double scale : {1.0, 1e-25, 1e-3}) {  // the second is too small for the proof
    std::vector<double> state = random_row(client.hidden);
    for (double& x : state) x *= scale;
    const std::vector<std::byte> row = encode(WireDtype::kF32, state);
    bytes.insert(bytes.end(), row.begin(), row.end());
    logits.push_back(logits_of(*full, row, WireDtype::kF32));
  }
  const std::vector<SampleRequest> requests(rows);
  std::vector<std::int32_t> tokens(rows, -1);
  PhaseTimes times;
  REQUIRE(certified->next_tokens(bytes, WireDtype::kF32, requests, tokens, times).ok());
  for (std::size_t i = 0; i < rows; ++i) {
    CHECK(tokens[i] == std::max_element(logits[i].begin(), logits[i].end()) - logits[i].begin());
  }
  const HeadCounters counters = certified->head_counters();
  CHECK(counters.tokens == rows);
  CHECK(counters.full_passes == 1);
  CHECK(counters.rows_rescored >= rows - 1);
  CHECK(counters.rows_rescored < client.vocab / 4);
  // Alone, too.
  const std::size_t row_bytes = bytes.size() / rows;
  REQUIRE(certified
              ->next_tokens(std::span(bytes).subspan(row_bytes, row_bytes), WireDtype::kF32,
                            std::span(requests).first(1), std::span(tokens).first(1), times)
              .ok());
  CHECK(tokens[0] == tokens[1]);
  CHECK(certified->head_counters().full_passes == 2);
  CHECK(full->head_counters().tokens == 0);

  // Without the proof the token is a good one, not always the best: off by twice the largest
  // error, half a step of 1/127 of the largest weight for every element.
  REQUIRE(int8->next_tokens(bytes, WireDtype::kF32, requests, tokens, times).ok());
  CHECK(int8->head_counters().tokens == 0);
  for (std::size_t i = 0; i < rows; ++i) {
    const float best = *std::max_element(logits[i].begin(), logits[i].end());
    REQUIRE(tokens[i] >= 0);
    CHECK(logits[i][static_cast<std::size_t>(tokens[i])] > 0.8f * best);
  }
}

TEMPLATE_TEST_CASE("the int8 head samples from the logits that it shows", "", INFEMERAL_BACKENDS) {
  if (!available<TestType>()) return;
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  const Client client({.hidden = 128, .vocab = 500});
  const auto int8 = load<TestType>(client, HeadMode::kInt8),
             full = load<TestType>(client, HeadMode::kFull);
  bool differs = false;
  for (double scale : {1.0, 1e-25, 0.1}) {  // the second is none for the int8 product
    std::vector<double> state = random_row(client.hidden);
    for (double& x : state) x *= scale;
    const std::vector<std::byte> row = encode(WireDtype::kF32, state);
    const std::vector<float> logits = logits_of(*int8, row, WireDtype::kF32);
    const std::vector<float> exact = logits_of(*full, row, WireDtype::kF32);
    if (scale == 1e-25) CHECK(logits == exact);
    differs = differs || logits != exact;
    for (SamplingParams params : kSamplingKinds) {
      params.seed = rng()();
      const SampleRequest request{.params = params};
      std::int32_t token = -1;
      PhaseTimes times;
      REQUIRE(int8->next_tokens(row, WireDtype::kF32, {&request, 1}, {&token, 1}, times).ok());
      check_sampled<TestType>(token, logits, request);
    }
  }
  CHECK(differs);
}

TEMPLATE_TEST_CASE("the subset head answers from the subset where it is confident, and counts", "",
                   INFEMERAL_BACKENDS) {
  if (!available<TestType>()) return;
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  const Client client(
      {.hidden = 70 + random_index(80), .vocab = 500, .tied = random_index(2) == 0});
  const auto status_of = [&] {
    return TestType::make(client.open(), HeadMode::kSubset).status().code();
  };
  CHECK(status_of() == absl::StatusCode::kNotFound);
  std::vector<std::int32_t> ids;
  for (std::int32_t id = 0; id < 500; ++id) {
    if (random_index(4) == 0) ids.push_back(id);
  }
  ClientManifest other = client.manifest;
  other.model_fingerprint[0] ^= 1;
  REQUIRE(save_token_subset(ids, other, client.path()).ok());
  CHECK(status_of() == absl::StatusCode::kFailedPrecondition);
  REQUIRE(save_token_subset(ids, client.manifest, client.path()).ok());

  const auto subset = load<TestType>(client, HeadMode::kSubset),
             full = load<TestType>(client, HeadMode::kFull),
             single = load<TestType>(client, HeadMode::kSubset);
  const std::size_t rows = 100;
  const Batch batch = random_batch(client, WireDtype::kF32, rows);
  const std::vector<std::int32_t> tokens = next_tokens(*subset, batch, 0, rows);
  std::size_t hits = 0;
  SubsetSampler subset_sampler(ids, client.vocab);
  for (std::size_t i = 0; i < rows; ++i) {
    CAPTURE(i);
    const std::vector<float> logits = logits_of(*full, batch.rows(i), WireDtype::kF32);
    std::vector<float> of_subset;
    for (std::int32_t id : ids) of_subset.push_back(logits[static_cast<std::size_t>(id)]);
    const bool confident = subset_confidence(of_subset, {}) >= kSubsetConfidence;
    // The logits that a plain greedy request is answered from.
    std::vector<float> expected = logits;
    for (std::int32_t t = 0; confident && t < 500; ++t) {
      if (!std::binary_search(ids.begin(), ids.end(), t)) {
        expected[static_cast<std::size_t>(t)] = -std::numeric_limits<float>::infinity();
      }
    }
    REQUIRE(logits_of(*subset, batch.rows(i), WireDtype::kF32) == expected);

    SampleRequest request = batch.requests[i];
    request.history = batch.history;
    const auto guess = subset_sampler.sample(of_subset, request);
    hits += guess.has_value();
    if (guess) REQUIRE(tokens[i] == *guess);
    if (!guess) check_sampled<TestType>(tokens[i], logits, request);
    REQUIRE(next_tokens(*single, batch, i, 1)[0] == tokens[i]);
  }
  const HeadCounters counters = subset->head_counters();
  CHECK(counters.tokens == rows);
  CHECK(counters.subset_hits == hits);
  CHECK(counters.full_passes == rows - hits);
  CHECK(counters.rows_rescored == 0);
  CHECK(hits > 5);
  CHECK(hits < rows - 5);
  CHECK(subset->memory().weights_bytes >=
        full->memory().weights_bytes + ids.size() * client.hidden * 2);
}

TEMPLATE_TEST_CASE("the row of the token that was just chosen is that of any other time", "",
                   INFEMERAL_BACKENDS) {
  if (!available<TestType>()) return;
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  const Client client({.hidden = 81 + random_index(60), .vocab = 350});
  const auto fresh = load<TestType>(client, HeadMode::kFull);  // never chooses
  for (HeadMode head : {HeadMode::kCertified, HeadMode::kFull}) {
    const auto backend = load<TestType>(client, head);
    for (WireDtype came : kAllWires) {
      for (WireDtype leaves : kAllWires) {
        CAPTURE(head_mode_name(head).data(), wire_dtype_name(came).data(),
                wire_dtype_name(leaves).data(), client.hidden);
        const Batch batch = random_batch(client, came, 2 * kSamplingKinds.size());
        for (std::size_t i = 0; i < batch.requests.size(); ++i) {
          const std::int32_t token = next_tokens(*backend, batch, i, 1)[0];
          const std::int32_t other = (token + 1) % 350;
          const auto expected = embed(*fresh, token, leaves);
          const auto expected_other = embed(*fresh, other, leaves);
          // What comes between the token and its row.
          switch (random_index(5)) {
            case 0:
              REQUIRE(embed(*backend, other, leaves) == expected_other);
              break;
            case 1:
              (void)next_tokens(*backend, batch, 0, 2);
              break;
            case 2:
              (void)logits_of(*backend, batch.rows(0), came);
              break;
            default:
              break;
          }
          REQUIRE(embed(*backend, token, leaves) == expected);
          REQUIRE(embed(*backend, token, leaves) == expected);
          REQUIRE(embed(*backend, other, leaves) == expected_other);
          const std::vector<std::int32_t> pair = {token, other};
          auto both = expected;
          both.insert(both.end(), expected_other.begin(), expected_other.end());
          REQUIRE(embed(*backend, pair, leaves) == both);
        }
      }
    }
  }
}

TEMPLATE_TEST_CASE("bad input is refused with the fitting code, and harms no later call", "",
                   INFEMERAL_BACKENDS) {
  if (!available<TestType>()) return;
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  const Client client({});
  const auto backend = load<TestType>(client), twin = load<TestType>(client);
  PhaseTimes times;
  std::vector<std::byte> out(2 * wire_row_bytes(WireDtype::kF16, client.hidden));
  for (std::int32_t bad :
       {-1, static_cast<std::int32_t>(client.vocab), std::numeric_limits<std::int32_t>::min(),
        std::numeric_limits<std::int32_t>::max()}) {
    const std::vector<std::int32_t> ids = {0, bad};
    CHECK(backend->embed(ids, WireDtype::kF16, out, times).code() == kInvalid);
  }
  for (std::size_t n : {0, 1, 3}) {
    const std::vector<std::int32_t> ids(n, 1);
    CHECK(backend->embed(ids, WireDtype::kF16, out, times).code() == kInvalid);
  }
  std::vector<SampleRequest> requests(2);
  std::vector<std::int32_t> tokens(2, -7);
  const auto next = [&](std::span<const std::byte> rows, std::size_t n_tokens) {
    return backend
        ->next_tokens(rows, WireDtype::kF16, requests, std::span(tokens).first(n_tokens), times)
        .code();
  };
  CHECK(next(std::span(out).first(3), 2) == kInvalid);
  CHECK(next(out, 1) == kInvalid);
  requests[1].params.top_p = 0;
  CHECK(next(out, 2) == kInvalid);
  requests[1].params = {};
  std::vector<float> logits(client.vocab);
  const auto row = std::span<const std::byte>(out).first(out.size() / 2);
  CHECK(backend->logits(row, WireDtype::kF16, std::span(logits).first(client.vocab - 1)).code() ==
        kInvalid);
  CHECK(backend->logits(row.first(7), WireDtype::kF16, logits).code() == kInvalid);
  CHECK(tokens == std::vector<std::int32_t>{-7, -7});
  // Nothing asked, nothing done.
  CHECK(backend->embed({}, WireDtype::kF16, {}, times).ok());
  CHECK(backend->next_tokens({}, WireDtype::kF16, {}, {}, times).ok());

  for (HeadMode head : {HeadMode::kCertified, HeadMode::kFull, HeadMode::kInt8}) {
    const auto broken = load<TestType>(client, head);
    for (WireDtype dtype : kAllWires) {
      for (double bad : {std::numeric_limits<double>::quiet_NaN(), HUGE_VAL, -HUGE_VAL}) {
        for (std::size_t n : {1, 2, 9, 40}) {
          Batch batch = random_batch(client, dtype, n);
          const std::vector<std::int32_t> before = next_tokens(*broken, batch, 0, n);
          const Batch good = batch;
          // Past the encoder, which clamps what f16 cannot hold.
          const std::size_t at = random_index(n) * batch.row_bytes;
          const auto value = static_cast<float>(bad);
          const std::uint16_t half = f32_to_f16(value);
          const std::size_t j = random_index(client.hidden);
          if (dtype == WireDtype::kF32) std::memcpy(&batch.bytes[at + 4 * j], &value, 4);
          if (dtype == WireDtype::kF16) std::memcpy(&batch.bytes[at + 2 * j], &half, 2);
          if (dtype == WireDtype::kI8) std::memcpy(&batch.bytes[at], &half, 2);  // a scale
          CAPTURE(head_mode_name(head).data(), wire_dtype_name(dtype).data(), bad, n);
          std::vector<std::int32_t> chosen(n, -1);
          CHECK(broken->next_tokens(batch.bytes, dtype, batch.requests, chosen, times).code() ==
                absl::StatusCode::kDataLoss);
          CHECK(next_tokens(*broken, good, 0, n) == before);
        }
      }
    }
  }
  const Batch batch = random_batch(client, WireDtype::kF16, 5);
  CHECK(next_tokens(*backend, batch, 0, 5) == next_tokens(*twin, batch, 0, 5));
}

TEMPLATE_TEST_CASE("memory figures hold what was loaded", "", INFEMERAL_BACKENDS) {
  if (!available<TestType>()) return;
  for (bool tied : {false, true}) {
    const Client client({.hidden = 128, .vocab = 2000, .tied = tied});
    const auto certified = load<TestType>(client), full = load<TestType>(client, HeadMode::kFull);
    const std::size_t table = client.vocab * client.hidden * 2;
    const std::size_t weights = (tied ? 1 : 2) * table;
    CHECK(full->memory().weights_bytes >= weights);
    CHECK(full->memory().weights_bytes < weights + table / 2);  // tied tables once
    const std::size_t int8 = certified->memory().weights_bytes - full->memory().weights_bytes;
    CHECK(int8 >= table / 2);
    CHECK(int8 < table);
    (void)embed(*full, 3, WireDtype::kF32);
    const MemoryUse use = full->memory();
    const std::size_t matrix = 2 * client.hidden * client.hidden;
    CHECK(use.cloak_bytes >= matrix);
    CHECK(use.cloak_bytes <= 4 * matrix);
    if (TestType::kNeedsDevice) {
      CHECK(use.device_peak_bytes >= use.weights_bytes + use.cloak_bytes);
    } else {
      CHECK(use.device_peak_bytes == 0);
    }
  }
}

#ifdef INFEMERAL_HAVE_CUDA
TEST_CASE("CPU and CUDA give the same tokens, but for near-ties - Cuda") {
  if (!available<Cuda>()) return;
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  const std::size_t n = 100 * kSamplingKinds.size();
  std::size_t near_ties = 0;
  const Client client({.hidden = 100 + random_index(100), .vocab = 2000});
  const auto cpu = load<Cpu>(client), cuda = load<Cuda>(client);
  for (WireDtype dtype : kAllWires) {
    const Batch batch = random_batch(client, dtype, n);
    const std::vector<std::int32_t> here = next_tokens(*cpu, batch, 0, n),
                                    there = next_tokens(*cuda, batch, 0, n);
    for (std::size_t i = 0; i < n; ++i) {
      CAPTURE(wire_dtype_name(dtype).data(), i, client.hidden, here[i], there[i]);
      const std::vector<float> a = logits_of(*cpu, batch.rows(i), dtype),
                               b = logits_of(*cuda, batch.rows(i), dtype);
      // Both start from the same wire row and the same float16 numbers: what differs is the
      // rounding of their sums, in lm_head's product and in those with Q: one, and two more on f32.
      std::vector<float> row(client.hidden);
      decode_wire_row(dtype, batch.rows(i).data(), row);
      const double size = norm({row.begin(), row.end()}), products = 4;
      const double bound = products * static_cast<double>(client.hidden) *
                           (Cpu::kUnit + Cuda::kUnit) * client.largest_row() * size;
      double worst = 0;
      for (std::size_t t = 0; t < client.vocab; ++t) {
        worst = std::max(worst, std::fabs(static_cast<double>(a[t]) - b[t]));
      }
      REQUIRE(worst <= bound);
      if (here[i] == there[i]) continue;
      // Then logits that are no further apart than roundings give both tokens.
      SampleRequest request = batch.requests[i];
      request.history = batch.history;
      REQUIRE(sampled(a, request) == here[i]);
      check_sampled<Cuda>(there[i], b, request);
      const auto gap =
          std::fabs(a[static_cast<std::size_t>(here[i])] - a[static_cast<std::size_t>(there[i])]);
      if (request.params.greedy() && request.params.repetition_penalty == 1) {
        CHECK(gap <= 2 * worst);
      }
      ++near_ties;
      std::cout << "near-tie: " << wire_dtype_name(dtype) << " row " << i << ", CPU " << here[i]
                << ", CUDA " << there[i] << ", logits " << gap << " apart, backends " << worst
                << ", bound " << bound << "\n";
    }
  }
  CHECK(near_ties * 100 < n * std::size(kAllWires));
}
#endif

}  // namespace infemeral
