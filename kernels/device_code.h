// Which of the build's code runs on the current device.
#pragma once

#include <cuda_runtime_api.h>

namespace infemeral::cuda {

// Launches a kernel that does nothing, so that a device which cannot run this build's code shows it
// here. `architecture` is what that code was compiled for: 90 for compute capability 9.0.
cudaError_t probe_device_code(cudaStream_t stream, int& architecture);

}  // namespace infemeral::cuda
