// Preparation's own proof: a block of the files just written does what the plain block does.
#pragma once

#include <cstddef>

#include "absl/status/statusor.h"
#include "cpu/rotation.h"
#include "engine/model_config.h"
#include "engine/safetensors.h"

namespace infemeral {

struct SelfCheck {
  double error = 0;
  double tolerance = 0;
};

// Runs layer `layer` of both checkpoints in float64 on a few random states x and compares what the
// blocks add to the stream: |(body(x Q) - x Q) - (plain(x) - x) Q| / |plain(x) - x|.
//
// The tolerance is 16 times what the plain block itself makes of noise in its weights' input of the
// size of the body dtype's rounding and of the cloak's (so a block with sharp attention gets the
// room that it needs), and never more than 0.5: a wrong fold or a wrong matrix gives more than 1.
absl::StatusOr<SelfCheck> self_check(const ModelConfig& config, const Safetensors& plain,
                                     const Safetensors& body, const Rotation& rotation,
                                     double orthogonality_error, Dtype body_dtype,
                                     std::size_t layer);

}  // namespace infemeral
