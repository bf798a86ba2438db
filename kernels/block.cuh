// Sums and maxima over warps and blocks. No machine code and no CUDA header of its own beyond the
// language: tests compile this for the host too (tests/emulated_block.h).
#pragma once

#ifdef __CUDACC__
#include <cuda_runtime.h>
#endif

#include <cstdint>

// What runs once a token, by one block, waits for its instructions more than for anything else:
// they come from the L2 cache. There loops stay loops (`unroll 1`), and what is called twice is
// there once.
#ifdef __CUDACC__
#define INFEMERAL_ONE_COPY __noinline__
#else
#define INFEMERAL_ONE_COPY
#endif

namespace infemeral::cuda {

inline constexpr int kWarp = 32;

// An order of floats by whole numbers, for atomic maxima: larger float, larger number. NaN is last;
// the two zeros are equal, as everywhere else.
__device__ inline std::uint32_t ordered(float x) {
  if (isnan(x)) return 0;
  const auto bits = __float_as_uint(x + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ inline float from_ordered(std::uint32_t key) {
  return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

// A score and its token as one number: the larger score is the larger, of equal ones the lower id.
__device__ inline unsigned long long ordered(float score, int id) {
  return static_cast<unsigned long long>(ordered(score)) << 32 | ~static_cast<std::uint32_t>(id);
}
__device__ inline float score_in(unsigned long long key) {
  return from_ordered(static_cast<std::uint32_t>(key >> 32));
}
__device__ inline int token_in(unsigned long long key) {
  return static_cast<int>(~static_cast<std::uint32_t>(key));
}

struct Sum {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Max {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};

// What other lanes hold. Structs that are reduced or summed have overloads of their own.
template <typename T>
__device__ T from_lane_xor(T value, int offset) {
  return __shfl_xor_sync(0xffffffffu, value, offset);
}
template <typename T>
__device__ T from_lane_below(T value, int offset) {
  return __shfl_up_sync(0xffffffffu, value, offset);
}

// In every lane, in an order that depends on nothing.
template <typename T, typename Op>
__device__ T warp_reduce(T value, Op op) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value = op(value, from_lane_xor(value, offset));
  }
  return value;
}

// In every thread of a block of whole warps. `identity` is op's neutral element.
template <typename T, typename Op>
__device__ T block_reduce(T value, T identity, Op op) {
  __shared__ T partial[kWarp];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  value = warp_reduce(value, op);
  __syncthreads();  // an earlier call may still read `partial`
  if (lane == 0) partial[warp] = value;
  __syncthreads();
  const int warps = blockDim.x / kWarp;
  return warp_reduce(lane < warps ? partial[lane] : identity, op);
}

}  // namespace infemeral::cuda
