// What only the CPU client backend has: instruction sets, threads, mapped weights, and a cloak that
// is made on first use. tests/backend_parity_test.cpp holds what every backend must do.
#include "cpu/client_backend.h"

#include <catch2/catch.hpp>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include "cpu/simd/dispatch.h"
#include "engine/token_subset.h"
#include "tests/client_fixture.h"
#include "tests/head_problems.h"
#include "tests/test_random.h"

namespace infemeral {
namespace {

constexpr double kUnit = 0x1p-24;

std::unique_ptr<ClientBackend> load(const Client& client, const CpuOptions& options = {}) {
  auto backend = make_cpu_client_backend(client.open(), options);
  INFO(backend.status().message());
  REQUIRE(backend.ok());
  return *std::move(backend);
}

class ScopedEnv {
 public:
  ScopedEnv(const char* name, const char* value) : name_(name) {
    if (const char* before = std::getenv(name)) before_ = before;
    setenv(name, value, 1);
  }
  ~ScopedEnv() { before_.empty() ? unsetenv(name_) : setenv(name_, before_.c_str(), 1); }

 private:
  const char* name_;
  std::string before_;
};

}  // namespace

TEST_CASE("embed and logits hold on every instruction set") {
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  for (const simd::Kernels* kernels : simd::available_kernels()) {
    const ScopedEnv env("INFEMERAL_ISA", kernels->name);
    for (bool tied : {false, true}) {
      const Client client({.hidden = 96 + random_index(60), .tied = tied});
      const auto backend = load(client);
      CHECK(backend->name() == "cpu (" + std::string(kernels->name) + ")");
      std::vector<std::int32_t> ids(300);  // more than one block
      for (std::int32_t& id : ids) id = static_cast<std::int32_t>(random_index(client.vocab));
      check_embed(client, *backend, ids);
      check_logits(client, *backend, kUnit);
    }
  }
}

TEST_CASE("the number of threads changes no bit, and every phase is timed") {
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  const Client client({.hidden = 128, .vocab = 500, .cloak = CloakMode::kEager});
  const auto one = load(client, {.threads = 1}), two = load(client, {.threads = 2});
  const std::size_t rows = 37;  // three blocks
  for (WireDtype dtype : kAllWires) {
    std::vector<std::byte> bytes;
    std::vector<SampleRequest> requests;
    for (std::size_t i = 0; i < rows; ++i) {
      const std::vector<std::byte> row = encode(dtype, random_row(client.hidden));
      bytes.insert(bytes.end(), row.begin(), row.end());
      requests.push_back({.params = kSamplingKinds[i % kSamplingKinds.size()], .position = i});
      requests.back().params.seed = rng()();
      std::vector<float> logits(client.vocab), other(client.vocab);
      REQUIRE(one->logits(row, dtype, logits).ok());
      REQUIRE(two->logits(row, dtype, other).ok());
      REQUIRE(std::memcmp(logits.data(), other.data(), logits.size() * sizeof(float)) == 0);
    }
    std::vector<std::int32_t> tokens(rows, -1), again(rows, -2);
    PhaseTimes times;
    REQUIRE(one->next_tokens(bytes, dtype, requests, tokens, times).ok());
    CHECK(times.decode_ms > 0);
    CHECK(times.uncloak_ms > 0);
    CHECK(times.de_embed_ms > 0);
    CHECK(times.sample_ms > 0);
    REQUIRE(two->next_tokens(bytes, dtype, requests, again, times).ok());
    CHECK(tokens == again);
  }
  std::vector<std::byte> out(wire_row_bytes(WireDtype::kF16, client.hidden));
  PhaseTimes times;
  REQUIRE(one->embed(std::vector<std::int32_t>{3}, WireDtype::kF16, out, times).ok());
  CHECK(times.embed_ms > 0);
  CHECK(times.cloak_ms > 0);
}

TEST_CASE("an instruction set that is none is refused") {
  const Client client({});
  const ScopedEnv env("INFEMERAL_ISA", "abacus");
  CHECK(make_cpu_client_backend(client.open(), {}).status().code() ==
        absl::StatusCode::kInvalidArgument);
}

TEST_CASE("errors say what is wrong") {
  const Client client({});
  const auto backend = load(client);
  PhaseTimes times;
  std::vector<std::byte> out(2 * wire_row_bytes(WireDtype::kF32, client.hidden));
  const auto has = [](const absl::Status& status, const char* words) {
    return std::string(status.message()).find(words) != std::string::npos;
  };
  CHECK(has(backend->embed(std::vector<std::int32_t>{0, 301}, WireDtype::kF32, out, times),
            "token 1 is outside the vocabulary of 301"));
  const float nan = NAN;
  std::memcpy(out.data(), &nan, sizeof nan);
  std::vector<std::int32_t> tokens(2);
  CHECK(
      has(backend->next_tokens(out, WireDtype::kF32, std::vector<SampleRequest>(2), tokens, times),
          "not finite"));
}

TEST_CASE("memory is that of the files, of the head mode, and of the cloak once it is made") {
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  for (bool tied : {false, true}) {
    const Client client({.tied = tied});
    const auto backend = load(client);
    const std::size_t table = client.vocab * client.hidden * 2;
    const std::size_t mapped = (tied ? 1 : 2) * table + client.hidden * 4;
    const std::size_t int8_copy = client.vocab * (client.hidden + 12);
    CHECK(backend->memory().weights_bytes == mapped + int8_copy);
    CHECK(load(client, {.head = HeadMode::kFull})->memory().weights_bytes == mapped);
    const std::vector<std::int32_t> subset = {1, 5, 7};
    REQUIRE(save_token_subset(subset, client.manifest, client.path()).ok());
    CHECK(load(client, {.head = HeadMode::kSubset})->memory().weights_bytes ==
          mapped + subset.size() * client.hidden * 2);
    CHECK(backend->memory().cloak_bytes == 0);
    PhaseTimes times;
    std::vector<std::byte> out(wire_row_bytes(WireDtype::kF16, client.hidden));
    const std::vector<std::int32_t> ids = {3};
    REQUIRE(backend->embed(ids, WireDtype::kF16, out, times).ok());
    CHECK(backend->memory().cloak_bytes == 2 * 2 * client.hidden * client.hidden);
    CHECK(backend->memory().device_peak_bytes == 0);
  }
}

TEST_CASE("a matrix file that is gone is an error of the first use, and of every later one") {
  const Client client({.cloak = CloakMode::kEager});
  const auto backend = load(client);
  std::filesystem::remove(client.path() / "cloak.safetensors");
  PhaseTimes times;
  std::vector<std::byte> out(wire_row_bytes(WireDtype::kF16, client.hidden));
  const std::vector<std::int32_t> ids = {3};
  for (int i = 0; i < 2; ++i) {
    CHECK(backend->embed(ids, WireDtype::kF16, out, times).code() == absl::StatusCode::kNotFound);
  }
}

}  // namespace infemeral
