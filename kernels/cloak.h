// The cloak's matrix on the device.
#pragma once

#include <cuda_fp16.h>

#include <cstddef>

#include "absl/status/statusor.h"
#include "engine/client_folder.h"
#include "kernels/device.h"

namespace infemeral::cuda {

struct DeviceCloak {
  Array<__half> packed;      // kernels/rotate.h: its rows, for y Q^T
  Array<__half> transposed;  // kernels/rotate.h: its columns, for x Q
  std::size_t bytes() const { return packed.bytes() + transposed.bytes(); }
};

// From the folder's file (eager), or made from its seed (lazy): large ones on the device, whose QR
// is far faster than the host's. Checks max |Q Q^T - I| < 1e-3 of what it makes.
absl::StatusOr<DeviceCloak> load_cloak(const Stage& stage, const ClientFolder& folder,
                                       DeviceUsage& usage);

// Q as Cloak::generate makes it, but for roundings, as float16 values in `rows` (row-major, n x
// padded(n)). Its Gaussians come from the host's keystream, the QR from cuSOLVER.
absl::Status generate_cloak(const Stage& stage, const CloakSeed& seed, std::size_t n, __half* rows,
                            DeviceUsage& usage);

}  // namespace infemeral::cuda
