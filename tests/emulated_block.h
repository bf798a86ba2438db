// One block of a CUDA kernel on the host: a thread for each of its threads, and what device code
// calls on them. Include it before the device code. Slow, and enough to see what a block computes
// where there is no GPU.
#pragma once

#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __device__
#define __shared__ static

namespace infemeral::cuda {

using std::isnan;

struct Index {
  int x;
};
struct float4 {
  float x, y, z, w;
};
struct ulonglong2 {
  unsigned long long x, y;
};
inline constexpr int kEmulatedThreads = 256;
inline thread_local Index threadIdx;
inline constexpr Index blockDim{kEmulatedThreads};
inline Index gridDim{1};  // of which one block is there

struct EmulatedBlock {
  std::barrier<> all{kEmulatedThreads};
  std::vector<std::unique_ptr<std::barrier<>>> warps;
  std::uint64_t lanes[kEmulatedThreads];

  EmulatedBlock() {
    for (int w = 0; w < kEmulatedThreads / 32; ++w) {
      warps.push_back(std::make_unique<std::barrier<>>(32));
    }
  }
  // kernel() in every thread.
  template <typename Kernel>
  void run(const Kernel& kernel) {
    std::vector<std::thread> threads;
    for (int t = 0; t < kEmulatedThreads; ++t) {
      threads.emplace_back([&kernel, t] {
        threadIdx.x = t;
        kernel();
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
};
inline EmulatedBlock& emulated_block() {
  static EmulatedBlock block;
  return block;
}

inline void __syncthreads() {
  emulated_block().all.arrive_and_wait();
}

template <typename T>
T from_lane(T value, int thread) {
  static_assert(sizeof(T) <= sizeof(std::uint64_t));
  EmulatedBlock& block = emulated_block();
  std::barrier<>& warp = *block.warps[static_cast<std::size_t>(threadIdx.x / 32)];
  std::memcpy(&block.lanes[threadIdx.x], &value, sizeof value);
  warp.arrive_and_wait();
  T result;
  std::memcpy(&result, &block.lanes[thread], sizeof result);
  warp.arrive_and_wait();
  return result;
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int offset) {
  return from_lane(value, threadIdx.x ^ offset);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int offset) {
  return from_lane(value, threadIdx.x % 32 >= offset ? threadIdx.x - offset : threadIdx.x);
}

template <typename T, typename U>
T atomicAdd(T* place, U value) {
  return __atomic_fetch_add(place, static_cast<T>(value), __ATOMIC_SEQ_CST);
}

template <typename T>
void atomicMax(T* place, T value) {
  T now = *place;
  while (now < value && !__atomic_compare_exchange_n(place, &now, value, false, __ATOMIC_SEQ_CST,
                                                     __ATOMIC_SEQ_CST)) {
  }
}

// Rounded up.
inline float __fsub_ru(float a, float b) {
  const float nearest = a - b;
  return static_cast<double>(nearest) < static_cast<double>(a) - b
             ? std::nextafter(nearest, HUGE_VALF)
             : nearest;
}
inline float __uint_as_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline std::uint32_t __float_as_uint(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline int min(int a, int b) {
  return a < b ? a : b;
}

}  // namespace infemeral::cuda
