// The cloak's matrix on the device.
#pragma once

#include <cublas_v2.h>
#include <cuda_fp16.h>

#include <cstddef>

#include "absl/status/statusor.h"
#include "engine/client_folder.h"
#include "kernels/device.h"

namespace infemeral::cuda {

absl::Status cublas_status(cublasStatus_t error, std::string_view what);

inline cudaError_t destroy_cublas(cublasHandle_t handle) {
  return cublasDestroy(handle) == CUBLAS_STATUS_SUCCESS ? cudaSuccess : cudaErrorUnknown;
}
using Cublas = Handle<cublasHandle_t, destroy_cublas>;

struct DeviceCloak {
  Array<__half> rows;        // Q, H x padded(H), row-major: for products of many rows by cuBLAS
  Array<__half> packed;      // kernels/rotate.h: its rows, for y Q^T
  Array<__half> transposed;  // kernels/rotate.h: its columns, for x Q
  std::size_t bytes() const { return rows.bytes() + packed.bytes() + transposed.bytes(); }
};

// From the folder's file (eager), or made from its seed (lazy): large ones on the device, whose QR
// is far faster than the host's. Checks max |Q Q^T - I| < 1e-3 of what it makes.
absl::StatusOr<DeviceCloak> load_cloak(const Stage& stage, const Cublas& cublas,
                                       const ClientFolder& folder, DeviceUsage& usage);

// Q as Cloak::generate makes it, but for roundings, as float16 values in `rows` (row-major, n x
// padded(n)). Its Gaussians come from the host's keystream, the QR from cuSOLVER.
absl::Status generate_cloak(const Stage& stage, const Cublas& cublas, const CloakSeed& seed,
                            std::size_t n, __half* rows, DeviceUsage& usage);

}  // namespace infemeral::cuda
