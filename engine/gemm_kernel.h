// The inner kernel of gemm.cpp: its contract, and one description for every instruction set.
#pragma once

#include <cstddef>

namespace infemeral {

// c[r * c_stride + j] += sum over p < k of a[p * rows + r] * b[p * cols + j], for a tile of
// rows x cols, summed in the order of p before it is added. a and b are packed slivers, b aligned
// to 64 bytes.
template <typename T>
struct GemmKernel {
  using Run = void (*)(std::size_t k, const T* a, const T* b, T* c, std::size_t c_stride);
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
