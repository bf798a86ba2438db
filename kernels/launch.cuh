// Launching a kernel of the token's chain.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <utility>

#include "kernels/stage.h"

namespace infemeral::cuda {

struct Shape {
  dim3 grid;
  dim3 block;
  std::size_t shared_bytes = 0;
};

template <typename... Params, typename... Args>
cudaError_t launch(const Stage& stage, const Shape& shape, void (*kernel)(Params...),
                   Args&&... args) {
  if (stage.overlap) {
    // A multiprocessor changes its split between cache and shared memory only when it is empty:
    // kernels that are to stand by beside each other must ask for the same.
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stage.stream;
  config.attrs = &attribute;
  config.numAttrs = stage.overlap ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(std::forward<Args>(args))...);
}

}  // namespace infemeral::cuda
