// The inner kernel of gemm.cpp: its contract, and one description for every instruction set.
#pragma once

#include <cstddef>

namespace infemeral {

// acc[r][c] = sum over p < k of a[p * rows + r] * b[p * cols + c], for a tile of rows x cols.
// a and b are packed panels, b aligned to 64 bytes; acc holds rows * cols values, aligned to 64.
template <typename T>
struct GemmKernel {
  using Run = void (*)(std::size_t k, const T* a, const T* b, T* acc);
  Run run;
  std::size_t rows, cols;
};

struct GemmKernels {
  GemmKernel<double> f64;
  GemmKernel<float> f32;
  const char* name;
};

GemmKernels gemm_kernels_baseline();
GemmKernels gemm_kernels_avx2();    // only on machines with AVX2 and FMA
GemmKernels gemm_kernels_avx512();  // only on machines with AVX-512F

}  // namespace infemeral
