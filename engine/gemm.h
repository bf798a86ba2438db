// Matrix products in float64 and float32: for making the cloak and for preparing a model. Blocked
// and packed after Goto and van de Geijn ("Anatomy of high-performance matrix multiplication", ACM
// TOMS 34, 2008), with an inner kernel for each instruction set, chosen at run time.
#pragma once

#include <cstddef>
#include <string_view>

namespace infemeral {

// Element (i, j) is data[i * row_stride + j * col_stride]: a transpose is an exchange of strides.
template <typename T>
struct BasicConstMatrix {
  const T* data = nullptr;
  std::ptrdiff_t row_stride = 0;
  std::ptrdiff_t col_stride = 1;

  BasicConstMatrix transposed() const { return {data, col_stride, row_stride}; }
  BasicConstMatrix block(std::size_t row, std::size_t col) const {
    return {data + static_cast<std::ptrdiff_t>(row) * row_stride +
                static_cast<std::ptrdiff_t>(col) * col_stride,
            row_stride, col_stride};
  }
};
using ConstMatrix = BasicConstMatrix<double>;
using ConstMatrixF32 = BasicConstMatrix<float>;

// C += alpha * A B, with A m x k, B k x n and C m x n row-major with `c_stride` between rows.
// C must not overlap A or B. Runs on oneTBB's threads of the calling arena; every element is summed
// in an order that depends on k alone, so the result does not depend on the number of threads.
// Allocates packing buffers of 2 KiB * (min(m, 4096) + min(n, 4096)); half of it in float32.
void gemm_add(std::size_t m, std::size_t n, std::size_t k, double alpha, ConstMatrix a,
              ConstMatrix b, double* c, std::size_t c_stride);
void gemm_add(std::size_t m, std::size_t n, std::size_t k, float alpha, ConstMatrixF32 a,
              ConstMatrixF32 b, float* c, std::size_t c_stride);

// "avx512", "avx2" or "baseline": the inner kernel of this machine.
std::string_view gemm_kernel_name();

}  // namespace infemeral
