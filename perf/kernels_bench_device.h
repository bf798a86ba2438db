// The device code of kernels_bench: fresh random numbers, the reading speed of the memory, a cache
// made cold.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace infemeral::bench {

// Normal numbers times `scale`: rows x stride, zero beyond cols.
void fill_normal(cudaStream_t stream, __half* out, std::size_t rows, int cols, int stride,
                 float scale, std::uint64_t seed);
// Reads `bytes` (a multiple of 32 KB) as fast as this project knows how to.
cudaError_t read_all(cudaStream_t stream, const std::byte* data, std::size_t bytes,
                     int multiprocessors, unsigned* sink);

}  // namespace infemeral::bench
