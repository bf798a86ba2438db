// The client's folded tables (engine_prep --fold-cloak): what preparation writes against float64
// arithmetic on the model and the float16 matrix, and what the backend makes of tables that are
// stored rotated.
#include <sys/stat.h>

#include <catch2/catch.hpp>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include "cpu/client_backend.h"
#include "cpu/client_tables.h"
#include "cpu/prepare.h"
#include "cpu/simd/dispatch.h"
#include "engine/float16.h"
#include "engine/token_subset.h"
#include "tests/client_fixture.h"
#include "tests/head_problems.h"
#include "tests/test_random.h"

namespace infemeral {
namespace {

namespace fs = std::filesystem;

std::vector<double> row_of(const TensorView& table, std::size_t row) {
  std::vector<float> values(table.shape[1]);
  table.read(row * values.size(), values);
  return {values.begin(), values.end()};
}

std::vector<double> times_q(const std::vector<double>& x, const Cloak& cloak) {
  const std::size_t h = x.size();
  std::vector<double> y(h, 0);
  for (std::size_t i = 0; i < h; ++i) {
    for (std::size_t j = 0; j < h; ++j) y[j] += x[i] * f16_to_f32(cloak.values()[i * h + j]);
  }
  return y;
}

std::unique_ptr<ClientBackend> load(const Client& client, const CpuOptions& options) {
  auto backend = make_cpu_client_backend(client.open(), options);
  INFO(backend.status().message());
  REQUIRE(backend.ok());
  return *std::move(backend);
}

std::vector<std::int32_t> tokens_of(ClientBackend& backend, std::span<const std::byte> rows,
                                    std::span<const SampleRequest> requests) {
  std::vector<std::int32_t> tokens(requests.size(), -1);
  PhaseTimes times;
  const absl::Status status = backend.next_tokens(rows, WireDtype::kF16, requests, tokens, times);
  INFO(status.message());
  REQUIRE(status.ok());
  CHECK(times.uncloak_ms == 0);
  return tokens;
}

}  // namespace

TEST_CASE("preparation writes E Q and lm_head diag(gain) Q^-T, rounded to float16") {
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  for (bool tied : {false, true}) {
    CAPTURE(tied);
    const TempFolder temp;
    const TinyModelOptions model_options{.tied = tied, .dtype = Dtype::kF16, .seed = rng()()};
    make_tiny_model(temp.path() / "model", model_options);
    const auto result = prepare_model({.model_dir = temp.path() / "model",
                                       .output_dir = temp.path() / "out",
                                       .cloak_mode = CloakMode::kFolded});
    INFO(result.status().ToString());
    REQUIRE(result.ok());
    const std::size_t v = model_options.vocab, h = model_options.hidden;
    CHECK(result->tied_embeddings == tied);
    CHECK(result->client_bytes == 2 * v * h * 2);
    CHECK(result->saved_bytes == 0);
    const fs::path path = temp.path() / "out" / "client";
    CHECK_FALSE(fs::exists(path / "cloak.safetensors"));
    struct stat info = {};
    REQUIRE(::stat((path / "client.safetensors").c_str(), &info) == 0);
    CHECK((info.st_mode & 0777) == 0600);

    const auto client = ClientFolder::open(path);
    INFO(client.status().ToString());
    REQUIRE(client.ok());
    CHECK(client->manifest.cloak_mode == CloakMode::kFolded);
    CHECK_FALSE(client->manifest.tied_embeddings);
    CHECK(client->weights.find("final_norm.weight") == nullptr);
    const auto cloak = client->load_cloak();
    const auto model = Safetensors::open_folder(temp.path() / "model");
    REQUIRE((cloak.ok() && model.ok()));
    const TensorView& embed = *model->find("model.embed_tokens.weight");
    const TensorView& head = tied ? embed : *model->find("lm_head.weight");
    const std::vector<double> gain = [&] {
      std::vector<float> values(h);
      model->find("model.norm.weight")->read(0, values);
      return std::vector<double>(values.begin(), values.end());
    }();
    const std::vector<double> state = random_row(h), rotated = times_q(state, *cloak);
    // Float32 sums of h products, of factors that were rounded before; then to float16.
    const double sums = 1.1 * static_cast<double>(h + 3) * 0x1p-24;
    const double half = 0x1p-11, subnormal = 0x1p-25;
    for (std::size_t row = 0; row < v; ++row) {
      const std::vector<double> plain = row_of(embed, row), expected = times_q(plain, *cloak),
                                stored = row_of(client->embed_tokens, row);
      for (std::size_t j = 0; j < h; ++j) {
        REQUIRE(std::fabs(stored[j] - expected[j]) <=
                half * std::fabs(expected[j]) + subnormal + sums * norm(plain));
      }
      std::vector<double> scaled = row_of(head, row);
      for (std::size_t j = 0; j < h; ++j) scaled[j] *= gain[j];
      const std::vector<double> folded = row_of(client->lm_head, row);
      double logit = 0, expected_logit = 0;
      for (std::size_t j = 0; j < h; ++j) {
        logit += folded[j] * rotated[j];
        expected_logit += scaled[j] * state[j];
      }
      const double root = std::sqrt(static_cast<double>(h));
      REQUIRE(std::fabs(logit - expected_logit) <=
              norm(rotated) *
                  (1.01 * half * norm(folded) + root * subnormal + root * sums * norm(scaled)));
    }
  }
}

TEST_CASE("preparation's own check sees tables that were folded with another matrix") {
  const TempFolder temp;
  make_tiny_model(temp.path() / "model", {.dtype = Dtype::kF16, .seed = reseed()});
  const auto model = Safetensors::open_folder(temp.path() / "model");
  REQUIRE(model.ok());
  const ClientTables tables{.embed = *model->find("model.embed_tokens.weight"),
                            .lm_head = *model->find("lm_head.weight"),
                            .final_norm = *model->find("model.norm.weight")};
  const std::size_t h = tables.final_norm.elements();
  const auto made = Rotation::make(Cloak::generate(CloakSeed::random(), h).value());
  const auto other = Rotation::make(Cloak::generate(CloakSeed::random(), h).value());
  REQUIRE((made.ok() && other.ok()));
  const fs::path file = temp.path() / "client.safetensors";
  ModelHash hash;
  REQUIRE(write_client_tables(file, tables, *model, {.fold = &*made}, hash).ok());
  const auto good = check_folded_tables(file, tables, *made);
  const auto bad = check_folded_tables(file, tables, *other);
  REQUIRE((good.ok() && bad.ok()));
  CHECK(good->error <= good->tolerance);
  CHECK(bad->error > 0.5);
}

TEST_CASE("the backend takes folded tables as they are, on every instruction set") {
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  const char* forced = std::getenv("INFEMERAL_ISA");
  for (const simd::Kernels* kernels : simd::available_kernels()) {
    setenv("INFEMERAL_ISA", kernels->name, 1);
    const Client client({.hidden = 96 + random_index(60), .cloak = CloakMode::kFolded});
    const auto backend = load(client, {});
    std::vector<std::int32_t> ids(300);  // more than one block
    for (std::int32_t& id : ids) id = static_cast<std::int32_t>(random_index(client.vocab));
    check_embed(client, *backend, ids);
    check_logits(client, *backend, 0x1p-24);
    CHECK(backend->memory().cloak_bytes == 0);
    CHECK(backend->memory().weights_bytes ==
          2 * client.vocab * client.hidden * 2 + backend->memory().head_copy_bytes);
  }
  forced != nullptr ? setenv("INFEMERAL_ISA", forced, 1) : unsetenv("INFEMERAL_ISA");
}

TEST_CASE("on folded tables the certified head gives the full head's tokens, and all heads run") {
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  const Client client({.hidden = 64 + random_index(100), .cloak = CloakMode::kFolded});
  std::vector<std::int32_t> all(client.vocab);
  for (std::size_t i = 0; i < all.size(); ++i) all[i] = static_cast<std::int32_t>(i);
  REQUIRE(save_token_subset(all, client.manifest, client.path()).ok());
  const std::size_t n = 10 * kSamplingKinds.size();
  std::vector<std::byte> rows;
  std::vector<SampleRequest> requests;
  for (std::size_t i = 0; i < n; ++i) {
    const std::vector<std::byte> row = encode(WireDtype::kF16, random_row(client.hidden));
    rows.insert(rows.end(), row.begin(), row.end());
    requests.push_back({.params = kSamplingKinds[i % kSamplingKinds.size()], .position = i});
    requests.back().params.seed = rng()();
  }
  const auto full = load(client, {.head = HeadMode::kFull}), certified = load(client, {});
  const std::vector<std::int32_t> tokens = tokens_of(*full, rows, requests);
  CHECK(tokens_of(*certified, rows, requests) == tokens);
  CHECK(certified->head_counters().full_passes < n / 4);
  // A subset of all tokens leaves none out.
  CHECK(tokens_of(*load(client, {.head = HeadMode::kSubset}), rows, requests) == tokens);
  for (std::int32_t token : tokens_of(*load(client, {.head = HeadMode::kInt8}), rows, requests)) {
    CHECK((token >= 0 && static_cast<std::size_t>(token) < client.vocab));
  }
}

TEST_CASE("folded rows get the noise that is asked for") {
  const Client client({.hidden = 512, .cloak = CloakMode::kFolded});
  const auto backend = load(client, {.cloak_noise = 0.1f});
  const std::vector<std::int32_t> ids = {7};
  std::vector<std::byte> out(wire_row_bytes(WireDtype::kF32, client.hidden));
  PhaseTimes times;
  REQUIRE(backend->embed(ids, WireDtype::kF32, out, times).ok());
  std::vector<float> row(client.hidden);
  decode_wire_row(WireDtype::kF32, out.data(), row);
  const std::vector<double> plain = client.embedding(7);
  std::vector<double> noise(client.hidden);
  for (std::size_t i = 0; i < row.size(); ++i) noise[i] = row[i] - plain[i];
  CHECK(norm(noise) > 0.05 * norm(plain));
  CHECK(norm(noise) < 0.2 * norm(plain));
}

TEST_CASE("folded tables that others can read, or of another key, are refused") {
  const Client client({.cloak = CloakMode::kFolded}), other({.cloak = CloakMode::kFolded});
  const fs::path file = client.path() / "client.safetensors";
  REQUIRE(::chmod(file.c_str(), 0640) == 0);
  const absl::Status readable = ClientFolder::open(client.path()).status();
  CHECK(absl::IsPermissionDenied(readable));
  CHECK(std::string(readable.message()).find("chmod 600") != std::string::npos);
  fs::copy_file(other.path() / "client.safetensors", file, fs::copy_options::overwrite_existing);
  REQUIRE(::chmod(file.c_str(), 0600) == 0);
  const absl::Status foreign = ClientFolder::open(client.path()).status();
  CHECK(absl::IsFailedPrecondition(foreign));
  CHECK(std::string(foreign.message()).find("was not folded with cloak.key") != std::string::npos);
}

}  // namespace infemeral
