// Weight matrices as they lie in the mapped file, and products with them on a thread pool.
#pragma once

#include <cstddef>
#include <span>
#include <string_view>

#include "absl/status/statusor.h"
#include "cpu/parallel.h"
#include "cpu/simd/kernels.h"
#include "engine/safetensors.h"

namespace infemeral {

// rows x cols, row-major; y = x * W^T maps cols to rows (PyTorch's [out, in]). Does not own.
struct Matrix {
  simd::Format format = simd::Format::kF32;
  const std::byte* data = nullptr;
  std::size_t rows = 0;
  std::size_t cols = 0;
  const float* scales = nullptr;  // kI8: one for each row

  std::size_t row_bytes() const {
    return cols * (format == simd::Format::kF32  ? sizeof(float)
                   : format == simd::Format::kI8 ? sizeof(std::int8_t)
                                                 : sizeof(std::uint16_t));
  }
  Matrix row(std::size_t i) const {
    return {format, data + i * row_bytes(), 1, cols, scales == nullptr ? nullptr : scales + i};
  }
};

// The matrix of a two-dimensional tensor, which must live as long (an I8 one's scales are its own);
// Unimplemented, naming it, for a dtype without a kernel.
absl::StatusOr<Matrix> matrix_of(const TensorView& tensor, std::string_view name);

// Rows of floats, `stride` apart.
struct Rows {
  float* data = nullptr;
  std::size_t stride = 0;

  float* operator[](std::size_t i) const { return data + i * stride; }
  Rows from(std::size_t i) const { return {(*this)[i], stride}; }
};

// One of several products of the same input: y = x * W^T + bias.
struct Linear {
  const Matrix* weight = nullptr;
  const float* bias = nullptr;  // weight->rows floats, or null
  Rows out;                     // m x weight->rows
};

// Indices [begin, end) of weight->rows, on the calling thread.
void linear_rows(const simd::Kernels& kernels, const Linear& product, const Rows& x, std::size_t m,
                 std::size_t begin, std::size_t end);

// All products, with their rows put end to end and shared out in one parallel loop: each weight
// crosses the memory bus once, whatever m is.
void linear(const simd::Kernels& kernels, ThreadPool& pool, std::span<const Linear> products,
            const Rows& x, std::size_t m);

// Rows of W below which a second thread does not pay, for m rows of x.
std::size_t linear_grain(std::size_t m, std::size_t cols);

// Where threads may cut the rows of W: a whole number of the kernels' tiles.
inline constexpr std::size_t kLinearAlign = 8;

}  // namespace infemeral
