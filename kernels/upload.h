// Weights from the mapped file to where the kernels read them.
#pragma once

#include <cuda_fp16.h>

#include <cstddef>
#include <span>

#include "absl/status/status.h"
#include "kernels/device.h"

namespace infemeral::cuda {

// Copies a rows x cols matrix of float16 to `target` (rows x stride, zeroed, device or pinned
// memory). Several threads read the file, and copy through pinned buffers of their own when the
// target is on the device: one thread is slower than the bus.
absl::Status upload_rows(const Device& device, std::span<const std::byte> source, std::size_t rows,
                         std::size_t cols, std::size_t stride, Place place, __half* target,
                         DeviceUsage& usage);

}  // namespace infemeral::cuda
