// The client's folder on disk, as engine_prep writes it:
//
//   engine.json            format_version, sizes, model fingerprint, cloak commitment and mode
//   client.safetensors     embed_tokens.weight [V, H] f16; lm_head.weight [V, H] f16 unless tied;
//                          final_norm.weight [H] f32; metadata tied_embeddings "true" | "false"
//                          Folded (format version 2): embed_tokens.weight = E Q and
//                          lm_head.weight = lm_head diag(gain) Q^-T, both rounded to f16 and never
//                          tied; no final_norm.weight; metadata cloak_commitment; mode 0600, since
//                          with the public E it gives Q
//   cloak.key              the 32-byte seed, mode 0600
//   cloak.safetensors      Q in f16 (eager mode only)
//   tokenizer.json, tokenizer_config.json, generation_config.json    copied from the model
//   subset.json            the tokens of the subset head, when --token-counts was given: see
//                          engine/token_subset.h
#pragma once

#include <cstddef>
#include <filesystem>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/cloak.h"
#include "engine/fingerprint.h"
#include "engine/link.h"
#include "engine/safetensors.h"

namespace infemeral {

enum class CloakMode {
  kLazy,   // only the seed is stored; the client makes the matrix, once
  kEager,  // the matrix is stored as a file
  kFolded  // the tables are stored rotated; nothing is multiplied with the matrix
};

struct ClientManifest {  // engine.json
  static constexpr int kFormatVersion = 1;
  static constexpr int kFoldedFormatVersion = 2;
  std::string model_type;
  std::size_t hidden_size = 0;
  std::size_t vocab_size = 0;
  std::size_t max_context = 0;
  bool tied_embeddings = false;  // of the tables as stored: folded ones never are
  CloakMode cloak_mode = CloakMode::kLazy;
  Fingerprint model_fingerprint{};
  Fingerprint cloak_commitment{};
};

// NotFound, with a hint at the right folder, when there is no engine.json; DataLoss when it is
// damaged; FailedPrecondition for another format version. save never overwrites.
absl::StatusOr<ClientManifest> load_client_manifest(const std::filesystem::path& folder);
absl::Status save_client_manifest(const ClientManifest& manifest,
                                  const std::filesystem::path& folder);

// The opened folder: everything checked, weights mapped, the matrix not yet made. Movable only.
struct ClientFolder {
  // FailedPrecondition when parts do not belong together (sizes, commitment); PermissionDenied when
  // group or others can read a secret file (cloak.key, folded tables); the tensor checks of
  // Safetensors; a hint in the error when the folder is not a client folder at all (for example the
  // OUT folder above it, a body folder, or a plain Hugging Face folder).
  static absl::StatusOr<ClientFolder> open(const std::filesystem::path& folder);

  // From the file (eager) or made from the seed. Slow: call once and keep the result.
  absl::StatusOr<Cloak> load_cloak() const;

  std::filesystem::path path;
  ClientManifest manifest;
  Safetensors weights;
  TensorView embed_tokens;  // [V, H] f16
  TensorView lm_head;       // [V, H] f16; the same view as embed_tokens when tied
  TensorView final_norm;    // [H] f32; empty when folded
  CloakSeed seed;
};

}  // namespace infemeral
