// The dot product of a float16 row with float32 states: one warp, each lane a fixed share of the
// columns in a fixed order, lanes summed in a fixed tree. Everything that multiplies with float16
// weights uses it, so a logit has the same bits in the full head and when it is rescored, whatever
// else is computed with it.
#pragma once

#include "kernels/common.cuh"

namespace infemeral::cuda {

inline constexpr int kLaneValues = 8;              // 16 bytes of float16
inline constexpr int kStep = kWarp * kLaneValues;  // columns that a warp takes at once

// States in shared memory: `stride` floats each, as two planes of 16-byte groups (groups of even
// number, then of odd number), so that a warp reads each plane without bank conflicts.
__device__ inline void load_states(const float* x, int states, int stride, float4* shared) {
  const int groups = stride / 4;
  const auto* in = reinterpret_cast<const float4*>(x);
  constexpr int kAhead = 4;  // loads on their way at once: each takes as long as all
  for (int first = threadIdx.x; first < states * groups; first += kAhead * blockDim.x) {
    float4 values[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int i = first + a * blockDim.x;
      if (i < states * groups) values[a] = in[i];
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int i = first + a * blockDim.x;
      const int state = i / groups, group = i % groups;
      if (i < states * groups) {
        shared[state * groups + (group % 2) * (groups / 2) + group / 2] = values[a];
      }
    }
  }
}

__device__ inline float2 halves(std::uint32_t bits) {
  __half2 pair;
  memcpy(&pair, &bits, sizeof pair);
  return __half22float2(pair);
}

__device__ inline float add_products(const uint4& w, const float4& low, const float4& high,
                                     float sum) {
  const float2 w0 = halves(w.x), w1 = halves(w.y), w2 = halves(w.z), w3 = halves(w.w);
  sum = __fmaf_rn(w0.x, low.x, sum);
  sum = __fmaf_rn(w0.y, low.y, sum);
  sum = __fmaf_rn(w1.x, low.z, sum);
  sum = __fmaf_rn(w1.y, low.w, sum);
  sum = __fmaf_rn(w2.x, high.x, sum);
  sum = __fmaf_rn(w2.y, high.y, sum);
  sum = __fmaf_rn(w3.x, high.z, sum);
  return __fmaf_rn(w3.y, high.w, sum);
}

// sums[r][s] = w[r] . state s, in every lane. `stride` is a multiple of 64; Ahead steps of loads
// are in flight at once.
template <int Rows, int States, int Ahead>
__device__ inline void dot_rows(const __half* const (&w)[Rows], const float4* shared, int stride,
                                float (&sums)[Rows][States]) {
  const int lane = threadIdx.x % kWarp, groups = stride / 4;
#pragma unroll
  for (int r = 0; r < Rows; ++r) {
#pragma unroll
    for (int s = 0; s < States; ++s) sums[r][s] = 0;
  }
  for (int base = lane * kLaneValues; base < stride; base += Ahead * kStep) {
    uint4 values[Ahead][Rows];
#pragma unroll
    for (int a = 0; a < Ahead; ++a) {
#pragma unroll
      for (int r = 0; r < Rows; ++r) {
        if (base + a * kStep < stride) values[a][r] = load_streaming(w[r] + base + a * kStep);
      }
    }
#pragma unroll
    for (int a = 0; a < Ahead; ++a) {
      const int column = base + a * kStep;
      if (column >= stride) break;
#pragma unroll
      for (int s = 0; s < States; ++s) {
        const float4 low = shared[s * groups + column / kLaneValues];
        const float4 high = shared[s * groups + groups / 2 + column / kLaneValues];
#pragma unroll
        for (int r = 0; r < Rows; ++r) {
          sums[r][s] = add_products(values[a][r], low, high, sums[r][s]);
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < Rows; ++r) {
#pragma unroll
    for (int s = 0; s < States; ++s) sums[r][s] = warp_reduce(sums[r][s], Sum());
  }
}

}  // namespace infemeral::cuda
