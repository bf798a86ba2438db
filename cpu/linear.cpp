#include "cpu/linear.h"

#include <algorithm>

#include "engine/text.h"

namespace infemeral {

absl::StatusOr<Matrix> matrix_of(const TensorView& tensor, std::string_view name) {
  Matrix matrix{.data = tensor.data.data(), .rows = tensor.shape[0], .cols = tensor.shape[1]};
  switch (tensor.dtype) {
    case Dtype::kF32:
      matrix.format = simd::Format::kF32;
      return matrix;
    case Dtype::kF16:
      matrix.format = simd::Format::kF16;
      return matrix;
    case Dtype::kBF16:
      matrix.format = simd::Format::kBF16;
      return matrix;
    case Dtype::kI8:
      if (tensor.row_scales.empty()) break;
      matrix.format = simd::Format::kI8;
      matrix.scales = tensor.row_scales.data();
      return matrix;
  }
  return absl::UnimplementedError(cat("tensor ", name, " is ", dtype_name(tensor.dtype),
                                      "; weights must be F32, F16, BF16, or I8 with scales"));
}

void linear_rows(const simd::Kernels& kernels, const Linear& product, const Rows& x, std::size_t m,
                 std::size_t begin, std::size_t end) {
  const Matrix& w = *product.weight;
  const Rows& out = product.out;
  kernels.matmul[static_cast<std::size_t>(w.format)]({.a = x.data,
                                                      .lda = x.stride,
                                                      .w = w.data + begin * w.row_bytes(),
                                                      .ldw = w.cols,
                                                      .c = out.data + begin,
                                                      .ldc = out.stride,
                                                      .m = m,
                                                      .n = end - begin,
                                                      .k = w.cols});
  if (w.scales != nullptr) {
    for (std::size_t i = 0; i < m; ++i) {
      for (std::size_t j = begin; j < end; ++j) out[i][j] *= w.scales[j];
    }
  }
  if (product.bias == nullptr) return;
  for (std::size_t i = 0; i < m; ++i) {
    for (std::size_t j = begin; j < end; ++j) out[i][j] += product.bias[j];
  }
}

std::size_t linear_grain(std::size_t m, std::size_t cols) {
  // About 2 microseconds of multiplications, against 1 to hand them over.
  constexpr std::size_t kWorthwhile = 1u << 16;
  return kWorthwhile / std::max<std::size_t>(1, m * cols) + 1;
}

void linear(const simd::Kernels& kernels, ThreadPool& pool, std::span<const Linear> products,
            const Rows& x, std::size_t m) {
  if (m == 0) return;
  std::size_t total = 0;
  for (const Linear& p : products) total += p.weight->rows;
  const std::size_t grain = linear_grain(m, products[0].weight->cols);
  pool.for_ranges(total, grain, kLinearAlign, [&](const Range& range) {
    std::size_t first = 0;  // of this product, in the common numbering
    for (const Linear& p : products) {
      const std::size_t last = first + p.weight->rows;
      const std::size_t from = std::max(range.begin, first), to = std::min(range.end, last);
      if (from < to) linear_rows(kernels, p, x, m, from - first, to - first);
      first = last;
    }
  });
}

}  // namespace infemeral
