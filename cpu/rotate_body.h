// The body's tensors: which there are, how each is made from the plain model's, and in which files
// they lie.
#pragma once

#include <cstddef>
#include <filesystem>
#include <functional>
#include <stop_token>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "cpu/model_hash.h"
#include "cpu/rotation.h"
#include "engine/model_config.h"
#include "engine/safetensors.h"

namespace infemeral {

struct RotateBodyOptions {
  Dtype dtype = Dtype::kF16;
  std::size_t max_shard_bytes = 0;
  std::function<void(double done, double total)> progress;
  std::stop_token stop;
};

// Writes model.safetensors, or shards and their index when it would be larger than
// max_shard_bytes, into `folder`; adds every source tensor to `hash`. Returns the bytes of all
// tensors. Errors as prepare_model says.
absl::StatusOr<std::size_t> rotate_body(const ModelConfig& config, const Safetensors& model,
                                        const Rotation& rotation, const RotateBodyOptions& options,
                                        const std::filesystem::path& folder, ModelHash& hash);

}  // namespace infemeral
