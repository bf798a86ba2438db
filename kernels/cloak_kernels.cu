#include "kernels/cloak_kernels.h"

#include "kernels/common.cuh"

namespace infemeral::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void signs_kernel(const double* r, int n, double* signs) {
  const int j = blockIdx.x * blockDim.x + threadIdx.x;
  if (j < n) signs[j] = r[static_cast<std::size_t>(j) * n + j] < 0 ? -1 : 1;
}

// Tiles through shared memory: reads down columns, writes along rows.
constexpr int kTile = 32;
__global__ void store_kernel(const double* q, const double* signs, int n, int stride, __half* out) {
  __shared__ double tile[kTile][kTile + 1];
  const int i0 = blockIdx.x * kTile, j0 = blockIdx.y * kTile;
  for (int y = threadIdx.y; y < kTile; y += blockDim.y) {
    const int i = i0 + threadIdx.x, j = j0 + y;
    if (i < n && j < n) tile[y][threadIdx.x] = q[static_cast<std::size_t>(j) * n + i] * signs[j];
  }
  __syncthreads();
  for (int y = threadIdx.y; y < kTile; y += blockDim.y) {
    const int i = i0 + y, j = j0 + threadIdx.x;
    // By way of float32, as the host rounds.
    if (i < n && j < n) {
      out[static_cast<std::size_t>(i) * stride + j] =
          __float2half_rn(static_cast<float>(tile[threadIdx.x][y]));
    }
  }
}

__global__ void identity_error_kernel(const float* product, int n, float* worst) {
  float own = 0;
  const std::size_t size = static_cast<std::size_t>(n) * n;
  for (std::size_t i = blockIdx.x * blockDim.x + threadIdx.x; i < size;
       i += static_cast<std::size_t>(gridDim.x) * blockDim.x) {
    const float error = fabsf(product[i] - (i / n == i % n ? 1.0f : 0.0f));
    own = isnan(error) ? HUGE_VALF : fmaxf(own, error);
  }
  own = block_reduce(own, 0.0f, Max());
  if (threadIdx.x == 0) atomicMax(reinterpret_cast<unsigned*>(worst), __float_as_uint(own));
}

}  // namespace

cudaError_t diagonal_signs(const Stage& stage, const double* r, int n, double* signs) {
  signs_kernel<<<(n + kThreads - 1) / kThreads, kThreads, 0, stage.stream>>>(r, n, signs);
  return cudaGetLastError();
}

cudaError_t store_rounded(const Stage& stage, const double* q, const double* signs, int n,
                          int stride, __half* out) {
  const int tiles = (n + kTile - 1) / kTile;
  store_kernel<<<dim3(tiles, tiles), dim3(kTile, 8), 0, stage.stream>>>(q, signs, n, stride, out);
  return cudaGetLastError();
}

cudaError_t identity_error(const Stage& stage, const float* product, int n, float* worst) {
  identity_error_kernel<<<4 * stage.multiprocessors, kThreads, 0, stage.stream>>>(product, n,
                                                                                  worst);
  return cudaGetLastError();
}

}  // namespace infemeral::cuda
