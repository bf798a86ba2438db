// The CPU client backend against float64 arithmetic on the same tables and the same cloak.
#include "cpu/client_backend.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cpu/simd/dispatch.h"
#include "engine/float16.h"
#include "engine/subset_head.h"
#include "engine/token_subset.h"
#include "engine/wire.h"
#include "tests/tiny_model.h"

namespace infemeral {
namespace {

constexpr WireDtype kAllWires[] = {WireDtype::kF32, WireDtype::kF16, WireDtype::kI8};

std::mt19937_64& rng() {
  static std::mt19937_64 generator{std::random_device{}()};
  return generator;
}

std::vector<double> random_row(std::size_t n) {
  std::normal_distribution<double> normal;
  std::vector<double> x(n);
  for (double& v : x) v = normal(rng());
  return x;
}

double norm(const std::vector<double>& x) {
  double squares = 0;
  for (double v : x) squares += v * v;
  return std::sqrt(squares);
}

struct Sizes {
  std::size_t hidden = 96;
  std::size_t vocab = 301;
  bool tied = false;
  CloakMode cloak = CloakMode::kLazy;
};

// A client folder with random tables, and the numbers in it.
class Client {
 public:
  explicit Client(const Sizes& sizes) : hidden(sizes.hidden), vocab(sizes.vocab) {
    CloakSeed seed = CloakSeed::random();
    std::filesystem::create_directories(path());
    REQUIRE(seed.save(path() / "cloak.key").ok());
    Cloak cloak = Cloak::generate(seed, hidden).value();
    q.assign(cloak.values().begin(), cloak.values().end());
    if (sizes.cloak == CloakMode::kEager) {
      REQUIRE(cloak.save(path() / "cloak.safetensors", seed).ok());
    }
    manifest = {.model_type = "llama",
                .hidden_size = hidden,
                .vocab_size = vocab,
                .max_context = 64,
                .tied_embeddings = sizes.tied,
                .cloak_mode = sizes.cloak,
                .cloak_commitment = seed.commitment()};
    REQUIRE(save_client_manifest(manifest, path()).ok());

    std::normal_distribution<float> normal;
    for (std::size_t i = 0; i < vocab * hidden; ++i) embed.push_back(f32_to_f16(normal(rng())));
    for (std::size_t i = 0; i < vocab * hidden; ++i) head.push_back(f32_to_f16(normal(rng())));
    for (std::size_t i = 0; i < hidden; ++i) gain.push_back(1 + 0.3f * normal(rng()));
    if (sizes.tied) head = embed;
    std::vector<SafetensorsWriter::Declaration> tensors = {
        {"final_norm.weight", Dtype::kF32, {hidden}},
        {"embed_tokens.weight", Dtype::kF16, {vocab, hidden}}};
    if (!sizes.tied) tensors.push_back({"lm_head.weight", Dtype::kF16, {vocab, hidden}});
    auto writer = SafetensorsWriter::create(path() / "client.safetensors", tensors,
                                            {{"tied_embeddings", sizes.tied ? "true" : "false"}});
    REQUIRE(writer.ok());
    REQUIRE((*writer)->write(std::as_bytes(std::span(gain))).ok());
    REQUIRE((*writer)->write(std::as_bytes(std::span(embed))).ok());
    if (!sizes.tied) REQUIRE((*writer)->write(std::as_bytes(std::span(head))).ok());
    REQUIRE((*writer)->finish().ok());
  }

  std::filesystem::path path() const { return folder_.path() / "client"; }

  std::unique_ptr<ClientBackend> load(int threads = 0, HeadMode mode = HeadMode::kCertified) const {
    auto folder = ClientFolder::open(path());
    INFO(folder.status().message());
    REQUIRE(folder.ok());
    auto backend = make_cpu_client_backend(*std::move(folder), {.threads = threads, .head = mode});
    REQUIRE(backend.ok());
    return *std::move(backend);
  }

  // x * Q and y * Q^T with the float16 matrix, and lm_head * (gain * h).
  std::vector<double> cloaked(const std::vector<double>& x) const {
    std::vector<double> y(hidden, 0);
    for (std::size_t i = 0; i < hidden; ++i) {
      for (std::size_t j = 0; j < hidden; ++j) y[j] += x[i] * f16_to_f32(q[i * hidden + j]);
    }
    return y;
  }
  std::vector<double> times_transpose(const std::vector<double>& y) const {
    std::vector<double> x(hidden, 0);
    for (std::size_t i = 0; i < hidden; ++i) {
      for (std::size_t j = 0; j < hidden; ++j) x[i] += y[j] * f16_to_f32(q[i * hidden + j]);
    }
    return x;
  }
  std::vector<double> logits(const std::vector<double>& h) const {
    std::vector<double> result(vocab, 0);
    for (std::size_t t = 0; t < vocab; ++t) {
      for (std::size_t i = 0; i < hidden; ++i) {
        result[t] += f16_to_f32(head[t * hidden + i]) * (static_cast<double>(gain[i]) * h[i]);
      }
    }
    return result;
  }
  std::vector<double> embedding(std::size_t id) const {
    std::vector<double> x(hidden);
    for (std::size_t i = 0; i < hidden; ++i) x[i] = f16_to_f32(embed[id * hidden + i]);
    return x;
  }

  ClientManifest manifest;
  std::size_t hidden, vocab;
  std::vector<std::uint16_t> embed, head, q;
  std::vector<float> gain;

 private:
  TempFolder folder_;
};

std::vector<std::byte> encode(WireDtype dtype, const std::vector<double>& row) {
  const std::vector<float> values(row.begin(), row.end());
  std::vector<std::byte> bytes(wire_row_bytes(dtype, row.size()));
  encode_wire_row(dtype, values, bytes.data());
  return bytes;
}

// Relative rounding of a row in the wire format, in the 2-norm.
double wire_error(WireDtype dtype) {
  switch (dtype) {
    case WireDtype::kF32:
      return 0x1p-24;
    case WireDtype::kF16:
      return 0x1p-11;
    case WireDtype::kI8:
      return 4.0 / 127;  // half a step of max/127; max is below 8 deviations
  }
  return 0;
}

class ScopedEnv {
 public:
  ScopedEnv(const char* name, const char* value) : name_(name) { setenv(name, value, 1); }
  ~ScopedEnv() { unsetenv(name_); }

 private:
  const char* name_;
};

}  // namespace

TEST_CASE("embed gives the rows of the table times Q, in every wire format, on every path") {
  for (const simd::Kernels* kernels : simd::available_kernels()) {
    const ScopedEnv env("INFEMERAL_ISA", kernels->name);
    const Client client({.hidden = 70 + rng()() % 80});
    const auto backend = client.load();
    CHECK(backend->name() == "cpu (" + std::string(kernels->name) + ")");
    CHECK(backend->hidden_size() == client.hidden);
    CHECK(backend->vocab_size() == client.vocab);
    std::vector<std::int32_t> ids(300);  // more than one block
    for (std::int32_t& id : ids) id = static_cast<std::int32_t>(rng()() % client.vocab);
    for (WireDtype dtype : kAllWires) {
      const std::size_t row_bytes = wire_row_bytes(dtype, client.hidden);
      std::vector<std::byte> out(ids.size() * row_bytes, std::byte{0xff});
      PhaseTimes times;
      REQUIRE(backend->embed(ids, dtype, out, times).ok());
      CHECK(times.embed_ms > 0);
      CHECK(times.cloak_ms > 0);
      CHECK(times.sum() == times.embed_ms + times.cloak_ms);
      for (std::size_t i = 0; i < ids.size(); ++i) {
        const auto expected = client.cloaked(client.embedding(static_cast<std::size_t>(ids[i])));
        std::vector<float> row(client.hidden);
        decode_wire_row(dtype, out.data() + i * row_bytes, row);
        std::vector<double> error(client.hidden);
        for (std::size_t j = 0; j < row.size(); ++j) error[j] = row[j] - expected[j];
        const double sums = static_cast<double>(client.hidden) * 0x1p-24;
        REQUIRE(norm(error) <= (wire_error(dtype) + sums) * norm(expected));
      }
    }
  }
}

TEST_CASE("logits undo the cloak; on an f32 wire better than the float16 matrix itself could") {
  for (const simd::Kernels* kernels : simd::available_kernels()) {
    const ScopedEnv env("INFEMERAL_ISA", kernels->name);
    for (bool tied : {false, true}) {
      const Client client({.hidden = 96 + rng()() % 60, .tied = tied});
      const auto backend = client.load();
      const std::vector<double> h = random_row(client.hidden);
      const std::vector<double> expected = client.logits(h);
      const std::vector<double> returned = client.cloaked(h);
      // What one multiplication with Q^T would give, in float64: the error of the float16 matrix.
      const std::vector<double> plain = client.logits(client.times_transpose(returned));
      double largest_row = 0, matrix_error = 0;
      for (std::size_t t = 0; t < client.vocab; ++t) {
        double squares = 0;
        for (std::size_t i = 0; i < client.hidden; ++i) {
          squares += std::pow(f16_to_f32(client.head[t * client.hidden + i]) * client.gain[i], 2);
        }
        largest_row = std::max(largest_row, std::sqrt(squares));
        matrix_error = std::max(matrix_error, std::fabs(plain[t] - expected[t]));
      }
      for (WireDtype dtype : kAllWires) {
        CAPTURE(kernels->name, tied, wire_dtype_name(dtype).data());
        std::vector<float> logits(client.vocab, std::numeric_limits<float>::quiet_NaN());
        REQUIRE(backend->logits(encode(dtype, returned), dtype, logits).ok());
        double worst = 0;
        for (std::size_t t = 0; t < client.vocab; ++t) {
          worst = std::max(worst, std::fabs(logits[t] - expected[t]));
        }
        // |w . e| <= |w| |e|: rounding on the wire and in the sums; without refinement also Q's.
        const double sums = 3 * static_cast<double>(client.hidden) / 4 * 0x1p-24;
        const double bound = largest_row * norm(h) * (wire_error(dtype) + sums) +
                             (dtype == WireDtype::kF32 ? 0 : matrix_error);
        CHECK(worst <= bound);
        if (dtype == WireDtype::kF32) CHECK(worst < matrix_error / 10);
      }
    }
  }
}

TEST_CASE("next_tokens samples from those logits, for many rows as for each alone") {
  const Client client({.hidden = 128, .vocab = 500, .cloak = CloakMode::kEager});
  const auto one = client.load(1), two = client.load(2), full = client.load(1, HeadMode::kFull);
  const std::size_t rows = 37;  // three blocks
  const std::vector<std::int32_t> history = {1, 5, 7};
  for (WireDtype dtype : kAllWires) {
    std::vector<std::byte> bytes;
    std::vector<SampleRequest> requests;
    for (std::size_t i = 0; i < rows; ++i) {
      const std::vector<std::byte> row = encode(dtype, random_row(client.hidden));
      bytes.insert(bytes.end(), row.begin(), row.end());
      SampleRequest request{.position = i, .history = history};
      request.params.seed = rng()();
      if (i % 3 != 0) request.params.temperature = 0.8f;
      if (i % 3 == 1) request.params.top_p = 0.9f;
      if (i % 3 == 2) request.params.repetition_penalty = 1.3f;
      requests.push_back(request);
    }
    std::vector<std::int32_t> tokens(rows, -1), again(rows, -1);
    PhaseTimes times;
    REQUIRE(one->next_tokens(bytes, dtype, requests, tokens, times).ok());
    CHECK(times.decode_ms > 0);
    CHECK(times.uncloak_ms > 0);
    CHECK(times.de_embed_ms > 0);
    CHECK(times.sample_ms > 0);
    CHECK(times.embed_ms == 0);
    REQUIRE(two->next_tokens(bytes, dtype, requests, again, times).ok());
    CHECK(tokens == again);
    REQUIRE(full->next_tokens(bytes, dtype, requests, again, times).ok());
    CHECK(tokens == again);
    const std::size_t row_bytes = wire_row_bytes(dtype, client.hidden);
    for (std::size_t i = 0; i < rows; ++i) {
      const auto row = std::span<const std::byte>(bytes).subspan(i * row_bytes, row_bytes);
      std::vector<float> logits(client.vocab), other(client.vocab);
      REQUIRE(one->logits(row, dtype, logits).ok());
      REQUIRE(two->logits(row, dtype, other).ok());
      REQUIRE(std::memcmp(logits.data(), other.data(), logits.size() * sizeof(float)) == 0);
      Sampler sampler;
      REQUIRE(sampler.sample(logits, requests[i]) == tokens[i]);
    }
  }
}

TEST_CASE(
    "the certified head counts its work; what its proof does not cover goes to the full head") {
  const Client client({.hidden = 128, .vocab = 500});
  const auto certified = client.load(), full = client.load(0, HeadMode::kFull),
             int8 = client.load(0, HeadMode::kInt8);
  const std::size_t rows = 3, row_bytes = wire_row_bytes(WireDtype::kF32, client.hidden);
  std::vector<std::byte> bytes;
  std::vector<std::vector<float>> logits;
  for (double scale : {1.0, 1e-25, 1e-3}) {  // the second is too small for the proof
    std::vector<double> state = random_row(client.hidden);
    for (double& x : state) x *= scale;
    const std::vector<std::byte> row = encode(WireDtype::kF32, state);
    bytes.insert(bytes.end(), row.begin(), row.end());
    logits.emplace_back(client.vocab);
    REQUIRE(full->logits(row, WireDtype::kF32, logits.back()).ok());
  }
  REQUIRE(bytes.size() == rows * row_bytes);
  const std::vector<SampleRequest> requests(rows);
  std::vector<std::int32_t> tokens(rows, -1);
  PhaseTimes times;
  REQUIRE(certified->next_tokens(bytes, WireDtype::kF32, requests, tokens, times).ok());
  for (std::size_t i = 0; i < rows; ++i) {
    const auto best = std::max_element(logits[i].begin(), logits[i].end()) - logits[i].begin();
    CHECK(tokens[i] == best);
  }
  const HeadCounters counters = certified->head_counters();
  CHECK(counters.tokens == rows);
  CHECK(counters.full_passes == 1);
  CHECK(counters.rows_rescored >= rows - 1);
  CHECK(counters.rows_rescored < client.vocab / 4);
  CHECK(full->head_counters().tokens == 0);

  // Without the proof the token is a good one, not always the best: off by twice the largest
  // error, half a step of 1/127 of the largest weight for every element.
  REQUIRE(int8->next_tokens(bytes, WireDtype::kF32, requests, tokens, times).ok());
  CHECK(int8->head_counters().tokens == 0);
  for (std::size_t i = 0; i < rows; ++i) {
    const float best = *std::max_element(logits[i].begin(), logits[i].end());
    CHECK(logits[i][static_cast<std::size_t>(tokens[i])] > 0.8f * best);
  }
}

TEST_CASE("the subset head answers from the subset where it is confident, and counts") {
  for (const simd::Kernels* kernels : simd::available_kernels()) {
    const ScopedEnv env("INFEMERAL_ISA", kernels->name);
    const Client client({.hidden = 70 + rng()() % 80, .vocab = 500, .tied = rng()() % 2 == 0});
    std::vector<std::int32_t> ids;
    for (std::int32_t id = 0; id < 500; ++id) {
      if (rng()() % 4 == 0) ids.push_back(id);
    }
    REQUIRE(save_token_subset(ids, client.manifest, client.path()).ok());
    const auto subset = client.load(0, HeadMode::kSubset), full = client.load(0, HeadMode::kFull);
    const std::size_t rows = 100, row_bytes = wire_row_bytes(WireDtype::kF32, client.hidden);
    const std::vector<std::int32_t> history = {1, 5, 7, ids[0], ids[1]};
    std::vector<std::byte> bytes;
    std::vector<SampleRequest> requests;
    for (std::size_t i = 0; i < rows; ++i) {
      std::vector<double> state = random_row(client.hidden);
      for (double& x : state) x *= 0.1 * static_cast<double>(1 + i % 10);  // flat to peaked
      const std::vector<std::byte> row = encode(WireDtype::kF32, state);
      bytes.insert(bytes.end(), row.begin(), row.end());
      SampleRequest request{.position = i, .history = history};
      request.params.seed = rng()();
      if (i % 2 != 0) request.params.temperature = 0.8f;
      if (i % 3 == 1) request.params.top_p = 0.9f;
      if (i % 5 == 2) request.params.repetition_penalty = 1.3f;
      requests.push_back(request);
    }
    std::vector<std::int32_t> tokens(rows, -1);
    PhaseTimes times;
    REQUIRE(subset->next_tokens(bytes, WireDtype::kF32, requests, tokens, times).ok());
    CHECK(times.de_embed_ms > 0);
    CHECK(times.sample_ms > 0);

    std::size_t hits = 0;
    SubsetSampler subset_sampler(ids, client.vocab);
    Sampler sampler;
    for (std::size_t i = 0; i < rows; ++i) {
      const auto row = std::span<const std::byte>(bytes).subspan(i * row_bytes, row_bytes);
      std::vector<float> logits(client.vocab), of_subset;
      REQUIRE(full->logits(row, WireDtype::kF32, logits).ok());
      for (std::int32_t id : ids) of_subset.push_back(logits[static_cast<std::size_t>(id)]);
      const bool confident = subset_confidence(of_subset, {}) >= kSubsetConfidence;

      // The logits that a plain greedy request is answered from.
      std::vector<float> mode_logits(client.vocab);
      REQUIRE(subset->logits(row, WireDtype::kF32, mode_logits).ok());
      for (std::size_t t = 0; t < client.vocab; ++t) {
        const bool inside =
            std::binary_search(ids.begin(), ids.end(), static_cast<std::int32_t>(t));
        const float expected =
            confident && !inside ? -std::numeric_limits<float>::infinity() : logits[t];
        REQUIRE(mode_logits[t] == expected);
      }

      const auto guess = subset_sampler.sample(of_subset, requests[i]);
      hits += guess.has_value();
      REQUIRE(tokens[i] == (guess ? *guess : sampler.sample(logits, requests[i])));
      std::int32_t alone = -1;
      REQUIRE(client.load(0, HeadMode::kSubset)
                  ->next_tokens(row, WireDtype::kF32, {&requests[i], 1}, {&alone, 1}, times)
                  .ok());
      REQUIRE(alone == tokens[i]);
    }
    const HeadCounters counters = subset->head_counters();
    CHECK(counters.tokens == rows);
    CHECK(counters.subset_hits == hits);
    CHECK(counters.full_passes == rows - hits);
    CHECK(counters.rows_rescored == 0);
    CHECK(hits > 5);
    CHECK(hits < rows - 5);
    CHECK(subset->memory().weights_bytes ==
          full->memory().weights_bytes + ids.size() * client.hidden * 2);
  }
}

TEST_CASE("the subset head needs a subset of this model") {
  const Client client({});
  const auto status_of = [&] {
    return make_cpu_client_backend(ClientFolder::open(client.path()).value(),
                                   {.head = HeadMode::kSubset})
        .status();
  };
  CHECK(absl::IsNotFound(status_of()));
  const std::vector<std::int32_t> ids = {3};
  ClientManifest other = client.manifest;
  other.model_fingerprint[0] ^= 1;
  REQUIRE(save_token_subset(ids, other, client.path()).ok());
  CHECK(absl::IsFailedPrecondition(status_of()));
  REQUIRE(save_token_subset(ids, client.manifest, client.path()).ok());
  CHECK(status_of().ok());
}

TEST_CASE("the int8 head samples from the logits that it shows") {
  const Client client({.hidden = 128, .vocab = 500});
  const auto int8 = client.load(0, HeadMode::kInt8), full = client.load(0, HeadMode::kFull);
  bool differs = false;
  for (double scale : {1.0, 1e-25, 0.1}) {  // the second is none for the int8 product
    std::vector<double> state = random_row(client.hidden);
    for (double& x : state) x *= scale;
    const std::vector<std::byte> row = encode(WireDtype::kF32, state);
    std::vector<float> logits(client.vocab), exact(client.vocab);
    REQUIRE(int8->logits(row, WireDtype::kF32, logits).ok());
    REQUIRE(full->logits(row, WireDtype::kF32, exact).ok());
    if (scale == 1e-25) CHECK(logits == exact);
    differs = differs || logits != exact;
    const SampleRequest request{.params = {.temperature = 1, .seed = rng()()}};
    std::int32_t token = -1;
    PhaseTimes times;
    REQUIRE(int8->next_tokens(row, WireDtype::kF32, {&request, 1}, {&token, 1}, times).ok());
    Sampler sampler;
    CHECK(token == sampler.sample(logits, request));
  }
  CHECK(differs);
}

TEST_CASE("bad input is refused with the fitting code") {
  const Client client({});
  const auto backend = client.load();
  const auto message = [](const absl::Status& status) { return std::string(status.message()); };
  PhaseTimes times;
  std::vector<std::byte> out(2 * wire_row_bytes(WireDtype::kF16, client.hidden));
  for (std::int32_t bad :
       {-1, static_cast<std::int32_t>(client.vocab), std::numeric_limits<std::int32_t>::min()}) {
    const std::vector<std::int32_t> ids = {0, bad};
    const absl::Status status = backend->embed(ids, WireDtype::kF16, out, times);
    CHECK(status.code() == absl::StatusCode::kInvalidArgument);
    CHECK(message(status).find("token 1 is outside the vocabulary of 301") != std::string::npos);
  }
  const std::vector<std::int32_t> ids = {0, 1, 2};
  CHECK(backend->embed(ids, WireDtype::kF16, out, times).code() ==
        absl::StatusCode::kInvalidArgument);

  std::vector<SampleRequest> requests(2);
  std::vector<std::int32_t> tokens(2, -7);
  CHECK(backend->next_tokens(std::span(out).first(3), WireDtype::kF16, requests, tokens, times)
            .code() == absl::StatusCode::kInvalidArgument);
  CHECK(backend->next_tokens(out, WireDtype::kF16, requests, std::span(tokens).first(1), times)
            .code() == absl::StatusCode::kInvalidArgument);
  requests[1].params.top_p = 0;
  CHECK(backend->next_tokens(out, WireDtype::kF16, requests, tokens, times).code() ==
        absl::StatusCode::kInvalidArgument);
  requests[1].params = {};
  std::vector<float> logits(client.vocab - 1);
  CHECK(backend->logits(std::span(out).first(out.size() / 2), WireDtype::kF16, logits).code() ==
        absl::StatusCode::kInvalidArgument);

  for (WireDtype dtype : {WireDtype::kF32, WireDtype::kF16}) {
    for (double bad : {std::numeric_limits<double>::quiet_NaN(), HUGE_VAL, -HUGE_VAL}) {
      std::vector<double> row = random_row(client.hidden);
      std::vector<std::byte> bytes = encode(dtype, row);
      row[rng()() % row.size()] = bad;
      std::vector<std::byte> broken(bytes.size());
      // Past the encoder, which clamps what f16 cannot hold.
      for (std::size_t i = 0; i < row.size(); ++i) {
        const float value = static_cast<float>(row[i]);
        const std::uint16_t half = f32_to_f16(value);
        if (dtype == WireDtype::kF32) std::memcpy(&broken[4 * i], &value, 4);
        if (dtype == WireDtype::kF16) std::memcpy(&broken[2 * i], &half, 2);
      }
      bytes.insert(bytes.end(), broken.begin(), broken.end());
      const absl::Status status = backend->next_tokens(bytes, dtype, requests, tokens, times);
      CHECK(status.code() == absl::StatusCode::kDataLoss);
      CHECK(message(status).find("not finite") != std::string::npos);
    }
  }
  const ScopedEnv env("INFEMERAL_ISA", "abacus");
  CHECK(make_cpu_client_backend(ClientFolder::open(client.path()).value(), {}).status().code() ==
        absl::StatusCode::kInvalidArgument);
}

TEST_CASE("the cloak is made on first use, kept, and counted") {
  for (bool tied : {false, true}) {
    const Client client({.tied = tied});
    const auto backend = client.load();
    const std::size_t table = client.vocab * client.hidden * 2;
    const std::size_t mapped = (tied ? 1 : 2) * table + client.hidden * 4;
    const std::size_t int8_copy = client.vocab * (client.hidden + 12);
    CHECK(backend->memory().weights_bytes == mapped + int8_copy);
    CHECK(client.load(0, HeadMode::kFull)->memory().weights_bytes == mapped);
    CHECK(backend->memory().cloak_bytes == 0);
    PhaseTimes times;
    std::vector<std::byte> out(wire_row_bytes(WireDtype::kF16, client.hidden));
    const std::vector<std::int32_t> ids = {3};
    REQUIRE(backend->embed(ids, WireDtype::kF16, out, times).ok());
    CHECK(backend->memory().cloak_bytes == 2 * 2 * client.hidden * client.hidden);
  }
  // A matrix file that is gone is an error of the first use, and of every later one.
  const Client client({.cloak = CloakMode::kEager});
  const auto backend = client.load();
  std::filesystem::remove(client.path() / "cloak.safetensors");
  PhaseTimes times;
  std::vector<std::byte> out(wire_row_bytes(WireDtype::kF16, client.hidden));
  const std::vector<std::int32_t> ids = {3};
  for (int i = 0; i < 2; ++i) {
    CHECK(backend->embed(ids, WireDtype::kF16, out, times).code() == absl::StatusCode::kNotFound);
  }
}

}  // namespace infemeral
