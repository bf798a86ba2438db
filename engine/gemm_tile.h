// Included by gemm_kernel_*.cpp only, each compiled for its own instruction set; so everything here
// has internal linkage, and nothing with inline functions of its own is included.
#pragma once

#include "engine/gemm_kernel.h"

namespace infemeral {
namespace {

// kRows x (kVectors * kLanes) accumulators that stay in registers: each step of p loads kVectors
// vectors of b and broadcasts kRows values of a.
template <std::size_t kLanes, std::size_t kRows, std::size_t kVectors>
void run_tile(std::size_t k, const double* a, const double* b, double* acc) {
  typedef double Vector __attribute__((vector_size(kLanes * sizeof(double))));
  Vector sum[kRows][kVectors] = {};
  for (std::size_t p = 0; p < k; ++p) {
    const Vector* row = reinterpret_cast<const Vector*>(b + p * kVectors * kLanes);
    for (std::size_t r = 0; r < kRows; ++r) {
      for (std::size_t v = 0; v < kVectors; ++v) sum[r][v] += a[p * kRows + r] * row[v];
    }
  }
  Vector* out = reinterpret_cast<Vector*>(acc);
  for (std::size_t r = 0; r < kRows; ++r) {
    for (std::size_t v = 0; v < kVectors; ++v) out[r * kVectors + v] = sum[r][v];
  }
}

}  // namespace
}  // namespace infemeral
