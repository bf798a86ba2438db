// Writing a state's float16 planes; one block a state.
#pragma once

#include "kernels/common.cuh"
#include "kernels/rotate.h"

namespace infemeral::cuda {

// `largest` is the state's largest magnitude, the same in every thread. Its scale is a power of two
// that brings it to [2^10, 2^11): far from overflow, and low parts stay above float16's smallest.
__device__ inline float split_scale(float largest) {
  int exponent = 0;
  frexpf(largest, &exponent);
  return largest > 0 && isfinite(largest) ? ldexpf(1.0f, max(-120, min(120, 11 - exponent))) : 1.0f;
}

// Eight values from a multiple of 8 on.
__device__ inline void write_split(const Split& out, int groups, int s, int column,
                                   const float (&x)[8], float scale) {
  __half high[8], low[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float scaled = x[j] * scale;
    high[j] = __float2half_rn(scaled);
    low[j] = __float2half_rn(scaled - __half2float(high[j]));
  }
  uint4 bits;
  memcpy(&bits, high, sizeof bits);
  *reinterpret_cast<uint4*>(out.planes + plane_offset(groups, s, 0, 2 * column)) = bits;
  memcpy(&bits, low, sizeof bits);
  *reinterpret_cast<uint4*>(out.planes + plane_offset(groups, s, 1, 2 * column)) = bits;
}

}  // namespace infemeral::cuda
