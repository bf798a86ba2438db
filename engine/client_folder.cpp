#include "engine/client_folder.h"

#include <nlohmann/json.hpp>
#include <utility>

#include "engine/json_file.h"
#include "engine/text.h"

namespace infemeral {
namespace {

using nlohmann::json;

constexpr std::size_t kMaxManifestBytes = 1 << 20;
constexpr char kManifestName[] = "engine.json";

absl::Status manifest_error(const std::filesystem::path& file, std::string_view text) {
  return absl::DataLossError(
      cat(file.string(), ": ", text, "; prepare the model again with engine_prep"));
}

// What a folder without engine.json probably is, so that the user can name the right one.
std::string folder_hint(const std::filesystem::path& folder) {
  std::error_code ignored;
  const auto holds = [&](const char* name) {
    return std::filesystem::exists(folder / name, ignored);
  };
  if (holds("client/engine.json")) {
    return cat("; it holds one, though: use ", (folder / "client").string());
  }
  if (holds("infemeral.json")) {
    return "; it is a body folder: use the client folder that was prepared with it";
  }
  if (holds("config.json")) {
    return "; it looks like a Hugging Face model: prepare it first with engine_prep";
  }
  return "; use the client folder that engine_prep wrote";
}

absl::StatusOr<ClientManifest> read_manifest(const json& root, const std::filesystem::path& file) {
  if (!root.is_object()) return manifest_error(file, "not a JSON object");
  const int version = root.value("format_version", -1);
  if (version != ClientManifest::kFormatVersion &&
      version != ClientManifest::kFoldedFormatVersion) {
    return absl::FailedPreconditionError(
        cat(file.string(), " has the format version ", version, "; this program reads versions ",
            ClientManifest::kFormatVersion, " and ", ClientManifest::kFoldedFormatVersion,
            ": prepare the model again with this version's engine_prep"));
  }
  ClientManifest manifest;
  manifest.model_type = root.at("model_type").get<std::string>();
  manifest.tied_embeddings = root.at("tied_embeddings").get<bool>();
  for (const auto& [name, size] : {std::pair("hidden_size", &manifest.hidden_size),
                                   std::pair("vocab_size", &manifest.vocab_size),
                                   std::pair("max_context", &manifest.max_context)}) {
    const json& value = root.at(name);
    if (!value.is_number_unsigned() || value == 0 || value > (1u << 31)) {
      return manifest_error(file, cat(name, " is not a sensible size"));
    }
    *size = value.get<std::size_t>();
  }
  const auto mode = root.at("cloak_mode").get<std::string>();
  if (mode != "lazy" && mode != "eager" && mode != "folded") {
    return manifest_error(file, "cloak_mode is none of \"lazy\", \"eager\" and \"folded\"");
  }
  manifest.cloak_mode = mode == "lazy"    ? CloakMode::kLazy
                        : mode == "eager" ? CloakMode::kEager
                                          : CloakMode::kFolded;
  const bool folded = manifest.cloak_mode == CloakMode::kFolded;
  if (folded != (version == ClientManifest::kFoldedFormatVersion) ||
      (folded && manifest.tied_embeddings)) {
    return manifest_error(file, "cloak_mode disagrees with format_version or tied_embeddings");
  }
  for (const auto& [name, out] : {std::pair("model_fingerprint", &manifest.model_fingerprint),
                                  std::pair("cloak_commitment", &manifest.cloak_commitment)}) {
    const auto value = parse_fingerprint(root.at(name).get<std::string>());
    if (!value) return manifest_error(file, cat(name, " is not 64 hexadecimal digits"));
    *out = *value;
  }
  return manifest;
}

}  // namespace

absl::StatusOr<ClientManifest> load_client_manifest(const std::filesystem::path& folder) {
  const std::filesystem::path file = folder / kManifestName;
  const auto text = read_text_file(file, kMaxManifestBytes);
  if (absl::IsNotFound(text.status())) {
    return absl::NotFoundError(
        cat(folder.string(), " is not a client folder", folder_hint(folder)));
  }
  if (!text.ok()) return text.status();
  const auto root = parse_json(*text, file.string());
  if (!root.ok()) return manifest_error(file, "not valid JSON");
  try {
    return read_manifest(*root, file);
  } catch (const std::exception& e) {
    return manifest_error(file, e.what());
  }
}

absl::Status save_client_manifest(const ClientManifest& manifest,
                                  const std::filesystem::path& folder) {
  const bool folded = manifest.cloak_mode == CloakMode::kFolded;
  try {
    const nlohmann::ordered_json root = {
        {"format_version",
         folded ? ClientManifest::kFoldedFormatVersion : ClientManifest::kFormatVersion},
        {"model_type", manifest.model_type},
        {"hidden_size", manifest.hidden_size},
        {"vocab_size", manifest.vocab_size},
        {"max_context", manifest.max_context},
        {"tied_embeddings", manifest.tied_embeddings},
        {"cloak_mode", folded                                    ? "folded"
                       : manifest.cloak_mode == CloakMode::kLazy ? "lazy"
                                                                 : "eager"},
        {"model_fingerprint", fingerprint_text(manifest.model_fingerprint)},
        {"cloak_commitment", fingerprint_text(manifest.cloak_commitment)},
    };
    return write_new_file(folder / kManifestName, root.dump(2) + "\n", 0644);
  } catch (const std::exception& e) {
    return absl::InternalError(cat("cannot write ", kManifestName, ": ", e.what()));
  }
}

absl::StatusOr<ClientFolder> ClientFolder::open(const std::filesystem::path& folder) {
  auto manifest = load_client_manifest(folder);
  if (!manifest.ok()) return manifest.status();
  auto seed = CloakSeed::load(folder / "cloak.key");
  if (!seed.ok()) return seed.status();
  const auto mismatch = [&folder](const auto&... text) {
    return absl::FailedPreconditionError(cat(folder.string(), ": ", text...));
  };
  if (seed->commitment() != manifest->cloak_commitment) {
    return mismatch(
        "cloak.key is not the key that engine.json was written with; restore the key "
        "of this folder or prepare the model again");
  }
  const std::filesystem::path weights_file = folder / "client.safetensors";
  const bool folded = manifest->cloak_mode == CloakMode::kFolded;
  if (folded) {
    if (auto status = check_private_file(weights_file); !status.ok()) return status;
  }
  auto weights = Safetensors::open(weights_file);
  if (!weights.ok()) return weights.status();

  const auto tied = weights->metadata().find("tied_embeddings");
  if (tied == weights->metadata().end() ||
      tied->second != (manifest->tied_embeddings ? "true" : "false")) {
    return mismatch("client.safetensors and engine.json disagree about tied_embeddings");
  }
  if (folded) {
    const auto commitment = weights->metadata().find("cloak_commitment");
    if (commitment == weights->metadata().end() ||
        commitment->second != fingerprint_text(manifest->cloak_commitment)) {
      return mismatch("client.safetensors was not folded with cloak.key; prepare the model again");
    }
  }
  const auto get = [&](const char* name, Dtype dtype,
                       std::initializer_list<std::size_t> shape) -> absl::StatusOr<TensorView> {
    auto view = weights->get(name, std::span(shape.begin(), shape.size()));
    if (!view.ok()) return mismatch("client.safetensors: ", view.status().message());
    if (view->dtype != dtype) {
      return mismatch("client.safetensors: ", name, " is ", dtype_name(view->dtype), "; ",
                      dtype_name(dtype), " is needed");
    }
    return view;
  };
  const auto embed =
      get("embed_tokens.weight", Dtype::kF16, {manifest->vocab_size, manifest->hidden_size});
  if (!embed.ok()) return embed.status();
  const auto lm_head =
      manifest->tied_embeddings
          ? embed
          : get("lm_head.weight", Dtype::kF16, {manifest->vocab_size, manifest->hidden_size});
  if (!lm_head.ok()) return lm_head.status();
  weights->expect_streaming(*lm_head);
  TensorView final_norm;
  if (!folded) {
    const auto gain = get("final_norm.weight", Dtype::kF32, {manifest->hidden_size});
    if (!gain.ok()) return gain.status();
    final_norm = *gain;
  }

  return ClientFolder{folder,   *std::move(manifest),  *std::move(weights), *embed,
                      *lm_head, std::move(final_norm), *std::move(seed)};
}

absl::StatusOr<Cloak> ClientFolder::load_cloak() const {
  return manifest.cloak_mode == CloakMode::kEager
             ? Cloak::load(path / "cloak.safetensors", seed, manifest.hidden_size)
             : Cloak::generate(seed, manifest.hidden_size);
}

}  // namespace infemeral
