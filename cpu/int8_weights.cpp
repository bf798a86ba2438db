#include "cpu/int8_weights.h"

#include <algorithm>
#include <cmath>

#include "engine/text.h"

namespace infemeral {

float quantise_weights(std::span<const float> row, std::int8_t* out) {
  constexpr float kLargest = 127;
  float largest = 0;
  for (const float w : row) largest = std::max(largest, std::fabs(w));
  const float scale = largest / kLargest;
  for (std::size_t i = 0; i < row.size(); ++i) {
    // A scale that underflowed stands for a row that float32 can hardly tell from zeros.
    const float q = scale > 0 ? std::nearbyint(row[i] / scale) : 0;
    out[i] = static_cast<std::int8_t>(std::clamp(q, -kLargest, kLargest));
  }
  return scale;
}

absl::StatusOr<TensorView> find_matrix(const Safetensors& tensors, const std::string& name,
                                       std::span<const std::size_t> shape) {
  absl::StatusOr<TensorView> matrix = tensors.get(name, shape);
  if (!matrix.ok() || matrix->dtype != Dtype::kI8) return matrix;
  const std::size_t rows[] = {shape[0]};
  const absl::StatusOr<TensorView> scales = tensors.get(scale_name(name), rows);
  if (!scales.ok()) return scales.status();
  matrix->row_scales.resize(shape[0]);
  scales->read(0, matrix->row_scales);
  for (const float scale : matrix->row_scales) {
    if (!std::isfinite(scale) || scale < 0) {
      return absl::DataLossError(cat("tensor ", quote_name(scale_name(name)), " holds ", scale,
                                     ", which is no scale; copy the folder again"));
    }
  }
  return matrix;
}

}  // namespace infemeral
