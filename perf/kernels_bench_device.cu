#include <curand_kernel.h>

#include "kernels/bulk.cuh"
#include "kernels/common.cuh"
#include "perf/kernels_bench_device.h"

namespace infemeral::bench {
namespace {

__global__ void fill_kernel(__half* out, std::size_t rows, int cols, int stride, float scale,
                            std::uint64_t seed) {
  const std::size_t step = static_cast<std::size_t>(gridDim.x) * blockDim.x;
  curandStatePhilox4_32_10_t state;
  const std::size_t first = static_cast<std::size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  curand_init(seed, first, 0, &state);
  for (std::size_t i = first; i < rows * stride; i += step) {
    out[i] = __float2half(static_cast<int>(i % stride) < cols ? scale * curand_normal(&state) : 0);
  }
}

// One block a multiprocessor fetches 32 KB pieces, interleaved with the others', through shared
// memory: of a dozen ways tried the fastest on an H100, ahead of plain 16-byte loads by 3 %. Where
// there are no bulk copies, those.
constexpr int kPiece = 32 << 10, kStages = 4;
__global__ void read_kernel(const std::byte* data, std::size_t pieces, unsigned* sink) {
  unsigned sum = 0;
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) std::byte shared[];
  __shared__ std::uint64_t full[kStages];
  if (threadIdx.x == 0) {
    for (auto& barrier : full) cuda::barrier_init(&barrier, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  const std::size_t own =
      pieces > blockIdx.x ? (pieces - blockIdx.x + gridDim.x - 1) / gridDim.x : 0;
  const auto fetch = [&](std::size_t k) {
    const int stage = k % kStages;
    cuda::barrier_expect(&full[stage], kPiece);
    cuda::copy_bulk(shared + stage * kPiece, data + (k * gridDim.x + blockIdx.x) * kPiece, kPiece,
                    &full[stage]);
  };
  if (threadIdx.x == 0) {
    for (std::size_t k = 0; k < kStages && k < own; ++k) fetch(k);
  }
  for (std::size_t k = 0; k < own; ++k) {
    cuda::barrier_wait(&full[k % kStages], static_cast<int>(k / kStages & 1));
    for (int i = threadIdx.x * 16; i < kPiece; i += blockDim.x * 16) {
      const auto v = *reinterpret_cast<const uint4*>(shared + k % kStages * kPiece + i);
      sum += v.x ^ v.y ^ v.z ^ v.w;
    }
    __syncthreads();
    if (threadIdx.x == 0 && k + kStages < own) fetch(k + kStages);
  }
#else
  for (std::size_t k = blockIdx.x; k < pieces; k += gridDim.x) {
    for (int i = threadIdx.x * 16; i < kPiece; i += blockDim.x * 16) {
      const uint4 v = cuda::load_streaming(data + k * kPiece + i);
      sum += v.x ^ v.y ^ v.z ^ v.w;
    }
  }
#endif
  if (sum == 0x9e3779b9u) *sink = sum;  // never mind when: the loads must not be dropped
}

}  // namespace

void fill_normal(cudaStream_t stream, __half* out, std::size_t rows, int cols, int stride,
                 float scale, std::uint64_t seed) {
  fill_kernel<<<2048, 256, 0, stream>>>(out, rows, cols, stride, scale, seed);
}

cudaError_t read_all(cudaStream_t stream, const std::byte* data, std::size_t bytes,
                     int multiprocessors, unsigned* sink) {
  const cudaError_t error = cudaFuncSetAttribute(
      read_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kStages * kPiece);
  if (error != cudaSuccess) return error;
  read_kernel<<<multiprocessors, 256, kStages * kPiece, stream>>>(data, bytes / kPiece, sink);
  return cudaGetLastError();
}

}  // namespace infemeral::bench
