// What the server's process receives and stores: looked at, not promised.
#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <cstring>
#include <fstream>
#include <iterator>
#include <set>

#include "cpu/body.h"
#include "cpu/client_backend.h"
#include "cpu/prepare.h"
#include "engine/pipeline.h"
#include "net/body_server.h"
#include "net/client_link.h"
#include "tests/tiny_model.h"

namespace infemeral {
namespace {

// Runs the real body and keeps every number that reached it.
class RecordingBody final : public Body {
 public:
  explicit RecordingBody(std::unique_ptr<Body> body) : body_(std::move(body)) {}
  const BodyInfo& info() const override { return body_->info(); }
  absl::StatusOr<std::unique_ptr<BodySession>> new_session() override {
    return body_->new_session();
  }
  void run(std::span<BodyStep> steps) override {
    for (const BodyStep& step : steps) {
      states.insert(states.end(), step.states.begin(), step.states.end());
    }
    body_->run(steps);
  }

  std::vector<float> states;  // rows x H

 private:
  std::unique_ptr<Body> body_;
};

double cosine(std::span<const float> a, std::span<const float> b) {
  double ab = 0, aa = 0, bb = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    ab += double{a[i]} * b[i];
    aa += double{a[i]} * a[i];
    bb += double{b[i]} * b[i];
  }
  return ab / std::sqrt(aa * bb);
}

std::string read_file(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

struct Prepared {
  Prepared() {
    make_tiny_model(temp.path() / "model",
                    {.hidden = 128, .vocab = 200, .dtype = Dtype::kF16, .seed = 3});
    const auto result = prepare_model({.model_dir = temp.path() / "model",
                                       .output_dir = temp.path() / "out",
                                       .body_dtype = Dtype::kF32,
                                       .cloak_mode = CloakMode::kEager});
    INFO(result.status().ToString());
    REQUIRE(result.ok());
  }
  TempFolder temp;
  std::filesystem::path client = temp.path() / "out" / "client";
  std::filesystem::path body = temp.path() / "out" / "body";
};

}  // namespace

TEST_CASE("the body sees rotated rows only, and never a row of the embedding table") {
  Prepared prepared;
  auto folder = ClientFolder::open(prepared.client);
  REQUIRE(folder.ok());
  const std::size_t hidden = folder->manifest.hidden_size;
  std::vector<float> table(folder->manifest.vocab_size * hidden);
  folder->embed_tokens.read(0, table);

  RecordingBody body(*load_cpu_body(prepared.body, {}));
  const Identity server_identity = Identity::generate(), client_identity = Identity::generate();
  auto server = BodyServer::start(
      body, {.identity = &server_identity, .allow = {client_identity.public_key()}});
  REQUIRE(server.ok());
  auto link = connect_link({.server = "127.0.0.1:" + std::to_string((*server)->port()),
                            .server_key = server_identity.public_key(),
                            .identity = &client_identity,
                            .model_fingerprint = folder->manifest.model_fingerprint,
                            .cloak_commitment = folder->manifest.cloak_commitment,
                            .hidden_size = hidden});
  REQUIRE(link.ok());
  auto backend = make_cpu_client_backend(*std::move(folder), {});
  REQUIRE(backend.ok());
  Pipeline pipeline(**backend, **link, {.wire = WireDtype::kF32});
  std::vector<std::int32_t> ids = {5, 17, 100, 5, 199, 0};
  GenerateResult result;
  REQUIRE(pipeline.generate({.prompt = ids, .max_tokens = 10}, {}, {}, result).ok());
  ids.insert(ids.end(), result.tokens.begin(), result.tokens.end() - 1);

  REQUIRE(body.states.size() == ids.size() * hidden);
  for (std::size_t i = 0; i < ids.size(); ++i) {
    const std::span<const float> seen(body.states.data() + i * hidden, hidden);
    const std::span<const float> plain(table.data() + static_cast<std::size_t>(ids[i]) * hidden,
                                       hidden);
    // A random direction in 128 dimensions has a cosine of 0.09 (standard deviation) with any row.
    CHECK(std::fabs(cosine(seen, plain)) < 0.6);
    for (std::size_t v = 0; v < table.size() / hidden; ++v) {
      CHECK(std::fabs(cosine(seen, {table.data() + v * hidden, hidden})) < 0.6);
    }
    // What the threat model says is visible is visible: norms.
    double seen_norm = 0, plain_norm = 0;
    for (std::size_t j = 0; j < hidden; ++j) {
      seen_norm += double{seen[j]} * seen[j];
      plain_norm += double{plain[j]} * plain[j];
    }
    CHECK(std::sqrt(seen_norm) == Approx(std::sqrt(plain_norm)).epsilon(2e-3));
  }
}

TEST_CASE("the body's folder holds nothing of the client's") {
  Prepared prepared;
  const std::string seed = read_file(prepared.client / "cloak.key");
  REQUIRE(seed.size() == 32);
  auto folder = ClientFolder::open(prepared.client);
  REQUIRE(folder.ok());
  const std::size_t hidden = folder->manifest.hidden_size;

  std::set<std::string> names;
  std::string all;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(prepared.body)) {
    names.insert(entry.path().filename().string());
    if (entry.is_regular_file()) all += read_file(entry.path());
  }
  CHECK(names == std::set<std::string>{"config.json", "infemeral.json", "model.safetensors"});
  CHECK(all.find(seed) == std::string::npos);
  CHECK(all.find("\"vocab_size\": 200") == std::string::npos);

  // No row of the embedding table, in any of the formats that a body may be written in, and no row
  // of the matrix.
  const auto cloak = folder->load_cloak();
  REQUIRE(cloak.ok());
  for (std::size_t row = 0; row < hidden; ++row) {
    const auto bytes = std::as_bytes(cloak->values().subspan(row * hidden, hidden));
    CHECK(all.find(std::string(reinterpret_cast<const char*>(bytes.data()), 32)) ==
          std::string::npos);
  }
  for (std::size_t v = 0; v < folder->manifest.vocab_size; ++v) {
    std::vector<float> row(hidden);
    folder->embed_tokens.read(v * hidden, row);
    CHECK(all.find(std::string(reinterpret_cast<const char*>(row.data()), 32)) ==
          std::string::npos);
    const auto f16 = folder->embed_tokens.data.subspan(v * hidden * 2, 32);
    CHECK(all.find(std::string(reinterpret_cast<const char*>(f16.data()), 32)) ==
          std::string::npos);
  }
  // And no weight matrix that the plain model has.
  const auto plain = Safetensors::open_folder(prepared.temp.path() / "model");
  const auto rotated = Safetensors::open_folder(prepared.body);
  REQUIRE(plain.ok());
  REQUIRE(rotated.ok());
  for (const auto& [name, tensor] : plain->tensors()) {
    const TensorView* other = rotated->find(name);
    if (other == nullptr || tensor.shape.size() != 2) continue;
    std::vector<float> a(tensor.elements()), b(other->elements());
    tensor.read(0, a);
    other->read(0, b);
    if (a.size() == b.size()) CHECK(std::fabs(cosine(a, b)) < 0.3);
  }
}

TEST_CASE("a client that is not on the list gets nothing") {
  Prepared prepared;
  RecordingBody body(*load_cpu_body(prepared.body, {}));
  const Identity server_identity = Identity::generate(), listed = Identity::generate(),
                 stranger = Identity::generate();
  auto server =
      BodyServer::start(body, {.identity = &server_identity, .allow = {listed.public_key()}});
  REQUIRE(server.ok());
  const auto manifest = load_client_manifest(prepared.client);
  REQUIRE(manifest.ok());
  const auto link = connect_link({.server = "127.0.0.1:" + std::to_string((*server)->port()),
                                  .server_key = server_identity.public_key(),
                                  .identity = &stranger,
                                  .model_fingerprint = manifest->model_fingerprint,
                                  .cloak_commitment = manifest->cloak_commitment,
                                  .hidden_size = manifest->hidden_size});
  CHECK(absl::IsPermissionDenied(link.status()));
  CHECK(body.states.empty());
  CHECK((*server)->counters().handshakes == 0);
  CHECK((*server)->counters().open_sessions == 0);
}

}  // namespace infemeral
