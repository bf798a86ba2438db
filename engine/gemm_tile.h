// Included by gemm_kernel_*.cpp only, each compiled for its own instruction set; so everything here
// has internal linkage, and nothing with inline functions of its own is included.
#pragma once

#include "engine/gemm_kernel.h"

namespace infemeral {
namespace {

// All of a loop of few steps at once: gcc keeps an array in registers only when it sees every
// index.
#if defined(__clang__)
#define INFEMERAL_UNROLL _Pragma("unroll")
#else
#define INFEMERAL_UNROLL _Pragma("GCC unroll 16")
#endif

// kRows x (kVectors * kLanes) accumulators that stay in registers: each step of p loads kVectors
// vectors of b and broadcasts kRows values of a.
template <typename T, std::size_t kLanes, std::size_t kRows, std::size_t kVectors>
void run_tile(std::size_t k, const T* a, const T* b, T* c, std::size_t c_stride) {
  typedef T Vector __attribute__((vector_size(kLanes * sizeof(T)), may_alias));
  typedef Vector Unaligned __attribute__((aligned(alignof(T))));
  for (std::size_t r = 0; r < kRows; ++r) {  // comes while the sums are made
    for (std::size_t v = 0; v < kVectors; ++v) {
      __builtin_prefetch(c + r * c_stride + v * kLanes, 1);
    }
  }
  Vector sum[kRows][kVectors];
  INFEMERAL_UNROLL for (std::size_t r = 0; r < kRows; ++r) {
    INFEMERAL_UNROLL for (std::size_t v = 0; v < kVectors; ++v) sum[r][v] = Vector{};
  }
  for (std::size_t p = 0; p < k; ++p) {
    const Vector* row = reinterpret_cast<const Vector*>(b + p * kVectors * kLanes);
    INFEMERAL_UNROLL for (std::size_t r = 0; r < kRows; ++r) {
      INFEMERAL_UNROLL for (std::size_t v = 0; v < kVectors; ++v) {
        sum[r][v] += a[p * kRows + r] * row[v];
      }
    }
  }
  INFEMERAL_UNROLL for (std::size_t r = 0; r < kRows; ++r) {
    Unaligned* out = reinterpret_cast<Unaligned*>(c + r * c_stride);
    INFEMERAL_UNROLL for (std::size_t v = 0; v < kVectors; ++v) out[v] += sum[r][v];
  }
}

#undef INFEMERAL_UNROLL

// kBytes: of a vector register.
template <typename T, std::size_t kBytes, std::size_t kRows, std::size_t kVectors>
constexpr GemmKernel<T> tile_kernel() {
  constexpr std::size_t kLanes = kBytes / sizeof(T);
  return {run_tile<T, kLanes, kRows, kVectors>, kRows, kLanes * kVectors};
}
template <std::size_t kBytes, std::size_t kRows, std::size_t kVectors>
constexpr GemmKernels tile_kernels(const char* name) {
  return {tile_kernel<double, kBytes, kRows, kVectors>(),
          tile_kernel<float, kBytes, kRows, kVectors>(), name};
}

}  // namespace
}  // namespace infemeral
