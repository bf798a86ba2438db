// Where the kernels of a stage go.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

namespace infemeral::cuda {

struct Stage {
  cudaStream_t stream = nullptr;
  int multiprocessors = 1;
  std::size_t shared_bytes = 48 * 1024;  // of a block, at most
  // Whether a kernel may start before the one ahead of it in the stream has ended (programmatic
  // dependent launch). Only behind kernels of this room, which all know how to wait.
  bool overlap = false;
  // Whether this build's code for the device has products by warpgroups (kernels/warpgroup.cuh).
  bool warpgroups = false;
};

}  // namespace infemeral::cuda
