// The inner kernel of gemm.cpp: its contract, and one description for every instruction set.
#pragma once

#include <cstddef>

namespace infemeral {

// acc[r][c] = sum over p < k of a[p * rows + r] * b[p * cols + c], for a tile of rows x cols.
// a and b are packed panels, b aligned to 64 bytes; acc holds rows * cols doubles, aligned to 64.
struct GemmKernel {
  using Run = void (*)(std::size_t k, const double* a, const double* b, double* acc);
  Run run;
  std::size_t rows, cols;
  const char* name;
};

GemmKernel gemm_kernel_baseline();
GemmKernel gemm_kernel_avx2();    // only on machines with AVX2 and FMA
GemmKernel gemm_kernel_avx512();  // only on machines with AVX-512F

}  // namespace infemeral
