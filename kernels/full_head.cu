#include "kernels/full_head.h"

#include "kernels/dot.cuh"
#include "kernels/launch.cuh"

namespace infemeral::cuda {
namespace {

constexpr int kWarps = 8;  // a block

template <int Rows, int States, int Ahead>
__global__ void __launch_bounds__(kWarps* kWarp) full_head_kernel(FullHead p) {
  extern __shared__ float4 states[];
  let_next_start();
  wait_for_previous();
  if (p.started != nullptr && blockIdx.x == 0 && threadIdx.x == 0) *p.started = global_ns();
  load_states(p.states, States, p.stride, states);
  __syncthreads();
  const int lane = threadIdx.x % kWarp;
  const int first = (blockIdx.x * kWarps + static_cast<int>(threadIdx.x) / kWarp) * Rows;
  for (int row = first; row < p.vocab_size; row += kWarps * gridDim.x * Rows) {
    const __half* w[Rows];
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      w[r] = p.lm_head + static_cast<std::size_t>(min(row + r, p.vocab_size - 1)) * p.stride;
    }
    float sums[Rows][States];
    dot_rows<Rows, States, Ahead>(w, states, p.stride, sums);
    if (lane != 0) continue;
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      if (row + r >= p.vocab_size) break;
#pragma unroll
      for (int s = 0; s < States; ++s) {
        p.logits[s * score_stride(p.vocab_size) + row + r] = sums[r][s];
      }
    }
  }
}

template <int Rows, int States, int Ahead>
cudaError_t run(const Stage& stage, const FullHead& p) {
  const auto kernel = full_head_kernel<Rows, States, Ahead>;
  const auto shared_bytes = sizeof(float) * States * p.stride;
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  int resident = 0;
  const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
      &resident, kernel, kWarps * kWarp, shared_bytes);
  if (error != cudaSuccess) return error;
  if (resident == 0) return cudaErrorInvalidConfiguration;
  const int wanted = (p.vocab_size + kWarps * Rows - 1) / (kWarps * Rows);
  const int blocks =
      wanted < resident * stage.multiprocessors ? wanted : resident * stage.multiprocessors;
  return launch(stage, {dim3(blocks), dim3(kWarps * kWarp), shared_bytes}, kernel, p);
}

}  // namespace

cudaError_t full_head(const Stage& stage, const FullHead& args) {
  FullHead p = args;
  while (p.n > 0) {
    const auto fits = [&](int states) {
      return p.n >= states && sizeof(float) * states * p.stride <= stage.shared_bytes;
    };
    const int taken = fits(8) ? 8 : fits(4) ? 4 : 1;
    const cudaError_t error = taken == 8   ? run<4, 8, 1>(stage, p)
                              : taken == 4 ? run<4, 4, 1>(stage, p)
                                           : run<1, 1, 8>(stage, p);
    if (error != cudaSuccess) return error;
    p.n -= taken;
    p.states += static_cast<std::size_t>(taken) * p.stride;
    p.logits += taken * score_stride(p.vocab_size);
    p.started = nullptr;
  }
  return cudaSuccess;
}

}  // namespace infemeral::cuda
