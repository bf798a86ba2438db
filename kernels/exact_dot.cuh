// A product with one row of a packed matrix (kernels/rotate.h), as good as exact: the sums that
// engine/wire_edges.h asks for.
#pragma once

#include <cuda_fp16.h>

#include "kernels/common.cuh"
#include "kernels/layout.h"

namespace infemeral::cuda {

// Eight float16 values as floats.
__device__ inline void widen(const uint4& halves, float (&x)[8]) {
  __half2 pairs[4];
  memcpy(pairs, &halves, sizeof pairs);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float2 pair = __half22float2(pairs[j]);
    x[2 * j] = pair.x;
    x[2 * j + 1] = pair.y;
  }
}

// A share of the sum of matrix[row][i] * x[i] over i < stride: that of warp `share` of `Shares`
// that work together; in every lane. The sum of the shares is exact but for 2^-44 of the products'
// magnitudes. Products of two float16 numbers are floats, and what rounding takes from a sum of
// floats is one too (Knuth's TwoSum): no float64, of which most GPUs do little.
template <int Shares>
__device__ inline double exact_dot(const __half* matrix, int row, const __half* x, int stride,
                                   int share) {
  constexpr int kTileRows = 16, kBlockColumns = 32, kStep = Shares * kWarp / 4;
  constexpr int kAhead = 8;   // loads on their way at once
  constexpr int kChains = 4;  // sums that do not wait for each other
  const int lane = threadIdx.x % kWarp, part = lane % 4, blocks = stride / kBlockColumns;
  const __half* weights = matrix + static_cast<std::size_t>(row / kTileRows) * kTileRows * stride +
                          row % kTileRows / 8 * (8 * kWarp) + (row % 8 * 4 + part) * 8;
  float sums[kChains] = {}, lost[kChains] = {};
  for (int first = share * (kWarp / 4) + lane / 4; first < blocks; first += kAhead * kStep) {
    uint4 w_ahead[kAhead], x_ahead[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int block = first + a * kStep;
      if (block >= blocks) break;
      w_ahead[a] = *reinterpret_cast<const uint4*>(weights + block * (kTileRows * kBlockColumns));
      x_ahead[a] = *reinterpret_cast<const uint4*>(x + block * kBlockColumns + part * 8);
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      if (first + a * kStep >= blocks) break;
      float w[8], v[8];
      widen(w_ahead[a], w);
      widen(x_ahead[a], v);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        float& sum = sums[j % kChains];
        const float product = w[j] * v[j], next = sum + product, added = next - sum;
        lost[j % kChains] += (sum - (next - added)) + (product - added);
        sum = next;
      }
    }
  }
  double total = 0;
#pragma unroll
  for (int c = 0; c < kChains; ++c) {
    total += static_cast<double>(sums[c]) + static_cast<double>(lost[c]);
  }
  return warp_reduce(total, Sum());
}

}  // namespace infemeral::cuda
