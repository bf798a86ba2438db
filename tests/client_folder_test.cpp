#include "engine/client_folder.h"

#include <sys/stat.h>

#include <algorithm>
#include <catch2/catch.hpp>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>

#include "tests/page_advice.h"
#include "tests/tiny_model.h"

namespace infemeral {
namespace {

constexpr std::size_t kVocab = 10, kHidden = 64;

struct Weights {
  bool tied = false;
  std::string metadata = "false";
  Dtype embed_dtype = Dtype::kF16;
  std::size_t vocab = kVocab;
  bool lm_head = true;
};

void write_weights(const std::filesystem::path& folder, const Weights& w) {
  std::vector<SafetensorsWriter::Declaration> tensors = {
      {"final_norm.weight", Dtype::kF32, {kHidden}},
      {"embed_tokens.weight", w.embed_dtype, {w.vocab, kHidden}}};
  if (w.lm_head) tensors.push_back({"lm_head.weight", Dtype::kF16, {w.vocab, kHidden}});
  auto writer = SafetensorsWriter::create(folder / "client.safetensors", tensors,
                                          {{"tied_embeddings", w.metadata}});
  REQUIRE(writer.ok());
  std::size_t bytes = 0;
  for (const auto& t : tensors) {
    bytes += dtype_bytes(t.dtype) * kHidden * (t.shape.size() == 2 ? w.vocab : 1);
  }
  REQUIRE((*writer)->write(std::vector<std::byte>(bytes, std::byte{0x11})).ok());
  REQUIRE((*writer)->finish().ok());
}

ClientManifest make_folder(const std::filesystem::path& folder, CloakMode mode, bool tied) {
  std::filesystem::create_directories(folder);
  const CloakSeed seed = CloakSeed::random();
  REQUIRE(seed.save(folder / "cloak.key").ok());
  ClientManifest manifest{.model_type = "llama",
                          .hidden_size = kHidden,
                          .vocab_size = kVocab,
                          .max_context = 128,
                          .tied_embeddings = tied,
                          .cloak_mode = mode,
                          .model_fingerprint = {},
                          .cloak_commitment = seed.commitment()};
  manifest.model_fingerprint[3] = 0xab;
  REQUIRE(save_client_manifest(manifest, folder).ok());
  write_weights(folder, {.tied = tied, .metadata = tied ? "true" : "false", .lm_head = !tied});
  if (mode == CloakMode::kEager) {
    const auto cloak = Cloak::generate(seed, kHidden);
    REQUIRE(cloak.ok());
    REQUIRE(cloak->save(folder / "cloak.safetensors", seed).ok());
  }
  return manifest;
}

std::string message_of(const absl::Status& status) {
  return std::string(status.message());
}

}  // namespace

TEST_CASE("a client folder opens as it was written") {
  for (const CloakMode mode : {CloakMode::kLazy, CloakMode::kEager}) {
    for (const bool tied : {false, true}) {
      const TempFolder temp;
      const ClientManifest manifest = make_folder(temp.path(), mode, tied);
      const auto folder = ClientFolder::open(temp.path());
      REQUIRE(folder.ok());
      CHECK(folder->manifest.model_type == "llama");
      CHECK(folder->manifest.hidden_size == kHidden);
      CHECK(folder->manifest.vocab_size == kVocab);
      CHECK(folder->manifest.max_context == 128);
      CHECK(folder->manifest.tied_embeddings == tied);
      CHECK(folder->manifest.cloak_mode == mode);
      CHECK(folder->manifest.model_fingerprint == manifest.model_fingerprint);
      CHECK((folder->lm_head.data.data() == folder->embed_tokens.data.data()) == tied);
      CHECK(folder->final_norm.elements() == kHidden);
      CHECK(asked_for_huge_pages(folder->lm_head.data.data()) == has_huge_pages());
      const auto cloak = folder->load_cloak();
      REQUIRE(cloak.ok());
      const auto made = Cloak::generate(folder->seed, kHidden);
      CHECK(std::equal(cloak->values().begin(), cloak->values().end(), made->values().begin()));
    }
  }
}

TEST_CASE("the wrong folder is recognised, and the right one named") {
  const TempFolder temp;
  make_folder(temp.path() / "out" / "client", CloakMode::kLazy, true);
  const absl::Status above = ClientFolder::open(temp.path() / "out").status();
  CHECK(absl::IsNotFound(above));
  CHECK(message_of(above).find((temp.path() / "out" / "client").string()) != std::string::npos);

  make_tiny_model(temp.path() / "hf", {});
  CHECK(message_of(ClientFolder::open(temp.path() / "hf").status()).find("engine_prep") !=
        std::string::npos);
  std::ofstream(temp.path() / "hf" / "infemeral.json") << "{}";
  CHECK(message_of(ClientFolder::open(temp.path() / "hf").status()).find("body folder") !=
        std::string::npos);
  CHECK(absl::IsNotFound(ClientFolder::open(temp.path() / "none").status()));
}

TEST_CASE("parts that do not belong together are refused") {
  struct Case {
    const char* what;
    std::function<void(const std::filesystem::path&)> spoil;
    absl::StatusCode code;
    const char* message;
  };
  const auto replace_weights = [](Weights weights) {
    return [weights](const std::filesystem::path& folder) {
      std::filesystem::remove(folder / "client.safetensors");
      write_weights(folder, weights);
    };
  };
  const Case cases[] = {
      {"another key",
       [](const auto& folder) {
         std::filesystem::remove(folder / "cloak.key");
         REQUIRE(CloakSeed::random().save(folder / "cloak.key").ok());
       },
       absl::StatusCode::kFailedPrecondition, "cloak.key"},
      {"no key", [](const auto& folder) { std::filesystem::remove(folder / "cloak.key"); },
       absl::StatusCode::kNotFound, "cloak.key"},
      {"a public key file",
       [](const auto& folder) { REQUIRE(::chmod((folder / "cloak.key").c_str(), 0644) == 0); },
       absl::StatusCode::kPermissionDenied, "chmod 600"},
      {"no weights",
       [](const auto& folder) { std::filesystem::remove(folder / "client.safetensors"); },
       absl::StatusCode::kNotFound, "client.safetensors"},
      {"cut weights",
       [](const auto& folder) { std::filesystem::resize_file(folder / "client.safetensors", 500); },
       absl::StatusCode::kDataLoss, "client.safetensors"},
      {"another vocabulary", replace_weights({.vocab = kVocab + 1}),
       absl::StatusCode::kFailedPrecondition, "[11, 64]"},
      {"another dtype", replace_weights({.embed_dtype = Dtype::kF32}),
       absl::StatusCode::kFailedPrecondition, "F32"},
      {"no lm_head", replace_weights({.lm_head = false}), absl::StatusCode::kFailedPrecondition,
       "lm_head.weight"},
      {"metadata disagrees", replace_weights({.metadata = "true"}),
       absl::StatusCode::kFailedPrecondition, "tied_embeddings"},
  };
  for (const Case& c : cases) {
    INFO(c.what);
    const TempFolder temp;
    make_folder(temp.path(), CloakMode::kLazy, false);
    c.spoil(temp.path());
    const absl::Status status = ClientFolder::open(temp.path()).status();
    INFO(status.ToString());
    CHECK(status.code() == c.code);
    CHECK(message_of(status).find(c.message) != std::string::npos);
  }
}

TEST_CASE("a damaged manifest is refused, field by field") {
  const TempFolder temp;
  const ClientManifest manifest = make_folder(temp.path(), CloakMode::kLazy, false);
  const auto file = temp.path() / "engine.json";
  nlohmann::json good;
  std::ifstream(file) >> good;
  CHECK(absl::IsAlreadyExists(save_client_manifest(manifest, temp.path())));

  for (const auto& [name, value] : good.items()) {
    nlohmann::json missing = good;
    missing.erase(name);
    for (const nlohmann::json& bad :
         {missing,
          nlohmann::json(good).patch(
              {{{"op", "replace"}, {"path", "/" + name}, {"value", nullptr}}}),
          nlohmann::json(good).patch({{{"op", "replace"}, {"path", "/" + name}, {"value", -1}}})}) {
      std::ofstream(file) << bad;
      INFO(bad);
      CHECK_FALSE(load_client_manifest(temp.path()).ok());
    }
  }
  nlohmann::json other_version = good;
  other_version["format_version"] = ClientManifest::kFoldedFormatVersion + 1;
  std::ofstream(file) << other_version;
  CHECK(absl::IsFailedPrecondition(load_client_manifest(temp.path()).status()));
  for (const char* text : {"", "[]", "{", "null", "\"\xff\""}) {
    std::ofstream(file) << text;
    CHECK_FALSE(load_client_manifest(temp.path()).ok());
  }
  good["unknown"] = "fields of later versions do not matter";
  std::ofstream(file) << good;
  CHECK(load_client_manifest(temp.path()).ok());
}

TEST_CASE("fingerprints as text") {
  Fingerprint value;
  for (std::size_t i = 0; i < value.size(); ++i) value[i] = static_cast<std::uint8_t>(i * 37);
  CHECK(parse_fingerprint(fingerprint_text(value)) == value);
  CHECK(fingerprint_text(value).substr(0, 6) == "00254a");
  CHECK_FALSE(parse_fingerprint(std::string(63, '0')).has_value());
  CHECK_FALSE(parse_fingerprint(std::string(64, 'g')).has_value());
  CHECK_FALSE(parse_fingerprint(std::string(64, 'A')).has_value());
}

}  // namespace infemeral
