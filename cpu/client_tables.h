// The client's tables as engine_prep writes them: as they are, or folded (engine/client_folder.h).
#pragma once

#include <cstddef>
#include <filesystem>
#include <functional>
#include <stop_token>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "cpu/model_hash.h"
#include "cpu/rotation.h"
#include "cpu/self_check.h"
#include "engine/fingerprint.h"
#include "engine/safetensors.h"

namespace infemeral {

// Of the plain model.
struct ClientTables {
  TensorView embed, lm_head;  // [V, H]; the same view when the model has only one
  TensorView final_norm;      // [H]
  bool tied = false;          // the two have the same values
};

struct ClientTablesOptions {
  const Rotation* fold = nullptr;  // null: as they are
  Fingerprint commitment{};        // of the cloak's seed, for folded tables
  std::function<void(double done, double total)> progress;
  std::stop_token stop;
};

// Writes client.safetensors and adds the source tensors to `hash`. Holds a few thousand rows at a
// time, and gives back the pages of what was read. Returns the bytes of all tensors. Errors as
// prepare_model says.
absl::StatusOr<std::size_t> write_client_tables(const std::filesystem::path& file,
                                                const ClientTables& tables,
                                                const Safetensors& model,
                                                const ClientTablesOptions& options,
                                                ModelHash& hash);

// Rows of a folded file against float64: embeddings with E Q, and what the head makes of random
// rotated states with what the plain one makes of them; relative to their norms.
absl::StatusOr<SelfCheck> check_folded_tables(const std::filesystem::path& file,
                                              const ClientTables& tables, const Rotation& rotation);

}  // namespace infemeral
