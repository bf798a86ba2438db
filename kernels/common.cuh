// What every kernel here shares: waiting for the kernel before, sums over warps and blocks, loads.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/block.cuh"

namespace infemeral::cuda {

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

}  // namespace infemeral::cuda
