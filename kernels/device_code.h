// Which of the build's code runs on the current device.
#pragma once

#include <cuda_runtime_api.h>

namespace infemeral::cuda {

struct DeviceCode {
  int architecture = 0;     // what it was compiled for: 90 for compute capability 9.0
  bool warpgroups = false;  // whether with that architecture's own instructions (9.0a)
};

// Launches a kernel that hardly does anything, so that a device which cannot run this build's code
// shows it here.
cudaError_t probe_device_code(cudaStream_t stream, DeviceCode& code);

}  // namespace infemeral::cuda
