// What every kernel here shares: waiting for the kernel before, sums over warps and blocks, loads.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace infemeral::cuda {

inline constexpr int kWarp = 32;

// Programmatic dependent launch (compute capability 9.0): a kernel may start while the one before
// it still runs. It first does what depends on weights alone, then waits here: behind this line
// everything that earlier kernels wrote is visible. Elsewhere kernels start one after the other.
__device__ inline void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Lets the next kernel start as soon as there is room for it; it waits for this one's end by
// itself.
__device__ inline void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Nanoseconds of a clock that all multiprocessors share.
__device__ inline unsigned long long global_ns() {
  unsigned long long ns;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
  return ns;
}

// Weights are read once a token: they must not push out what is read again.
__device__ inline uint4 load_streaming(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}
__device__ inline void prefetch_l2(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

// An order of floats by whole numbers, for atomic maxima: larger float, larger number. NaN is last; the
// two zeros are equal, as everywhere else.
__device__ inline std::uint32_t ordered(float x) {
  if (isnan(x)) return 0;
  const auto bits = __float_as_uint(x + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ inline float from_ordered(std::uint32_t key) {
  return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
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

// In every lane, in an order that depends on nothing.
template <typename T, typename Op>
__device__ T warp_reduce(T value, Op op) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value = op(value, __shfl_xor_sync(0xffffffffu, value, offset));
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
