// The matrices of an int8 body: NAME as I8 [out, in] and, beside it, NAME_scale as F32 [out]. A
// weight is its row's scale times the stored integer, from -127 to 127.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "engine/safetensors.h"

namespace infemeral {

inline std::string scale_name(std::string_view matrix) {
  return std::string(matrix) + "_scale";
}

// Rounds one row, and returns its scale: the row's largest magnitude over 127, so that no weight is
// off by more than half of it. The values must be finite.
float quantise_weights(std::span<const float> row, std::int8_t* out);

// The matrix of that name and shape; of an I8 matrix with its scales. Errors: those of
// Safetensors::get, and DataLoss for a scale that is not finite or negative.
absl::StatusOr<TensorView> find_matrix(const Safetensors& tensors, const std::string& name,
                                       std::span<const std::size_t> shape);

}  // namespace infemeral
