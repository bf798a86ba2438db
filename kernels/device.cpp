#include "kernels/device.h"

#include <algorithm>
#include <cstring>

#include "engine/text.h"
#include "kernels/device_code.h"

namespace infemeral::cuda {

absl::Status cuda_status(cudaError_t error, std::string_view what) {
  if (error == cudaSuccess) return absl::OkStatus();
  const std::string text = cat(what, ": ", cudaGetErrorString(error));
  switch (error) {
    case cudaErrorMemoryAllocation:
      return absl::ResourceExhaustedError(cat("the GPU has not enough free memory (", text, ")"));
    case cudaErrorNoDevice:
    case cudaErrorInsufficientDriver:
    case cudaErrorStubLibrary:
    case cudaErrorSystemDriverMismatch:
    case cudaErrorSystemNotReady:
    case cudaErrorDevicesUnavailable:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorCompatNotSupportedOnDevice:
      return absl::UnavailableError(cat("there is no usable GPU: ", cudaGetErrorString(error)));
    default:
      return absl::InternalError(
          cat("the GPU failed (", text, "); open the engine again, or use --backend cpu"));
  }
}

absl::StatusOr<void*> allocate(Place place, std::size_t bytes, DeviceUsage& usage) {
  void* data = nullptr;
  bytes = std::max<std::size_t>(bytes, 1);
  if (place == Place::kDevice) {
    if (const cudaError_t error = cudaMalloc(&data, bytes); error != cudaSuccess) {
      (void)cudaGetLastError();  // running out of memory is no error of the device
      return cuda_status(error, cat("allocating ", bytes / 1000000, " MB"));
    }
    // Kernels run on streams that do not wait for the one of cudaMemset.
    cudaError_t cleared = cudaMemset(data, 0, bytes);
    if (cleared == cudaSuccess) cleared = cudaStreamSynchronize(nullptr);
    if (cleared != cudaSuccess) {
      (void)cudaFree(data);
      return cuda_status(cleared, "cudaMemset");
    }
    const std::size_t now = usage.bytes += bytes;
    for (std::size_t peak = usage.peak; peak < now;) {
      if (usage.peak.compare_exchange_weak(peak, now)) break;
    }
  } else {
    if (const cudaError_t error = cudaHostAlloc(&data, bytes, cudaHostAllocMapped);
        error != cudaSuccess) {
      (void)cudaGetLastError();
      return absl::ResourceExhaustedError(cat("cannot pin ", bytes / 1000000,
                                              " MB of host memory for the GPU (",
                                              cudaGetErrorString(error), ")"));
    }
    std::memset(data, 0, bytes);
  }
  ++usage.allocations;
  return data;
}

void deallocate(Place place, void* data, std::size_t bytes, DeviceUsage& usage) {
  bytes = std::max<std::size_t>(bytes, 1);
  if (place == Place::kDevice) {
    (void)cudaMemset(data, 0, bytes);
    (void)cudaFree(data);
    usage.bytes -= bytes;
  } else {
    std::memset(data, 0, bytes);
    (void)cudaFreeHost(data);
  }
}

absl::StatusOr<Device> open_device() {
  (void)cudaGetLastError();  // what the program's own calls left behind is not ours
  int count = 0;
  if (const cudaError_t error = cudaGetDeviceCount(&count); error != cudaSuccess || count == 0) {
    (void)cudaGetLastError();
    return cuda_status(error == cudaSuccess ? cudaErrorNoDevice : error, "cudaGetDeviceCount");
  }
  // By CUDA's rules some errors of a kernel last as long as the process.
  if (const cudaError_t error = cudaDeviceSynchronize(); error != cudaSuccess) {
    (void)cudaGetLastError();
    const absl::Status status = cuda_status(error, "cudaDeviceSynchronize");
    if (status.code() != absl::StatusCode::kInternal) return status;
    return absl::UnavailableError(cat("the GPU failed in this process (", cudaGetErrorString(error),
                                      ") and can be used again by a new one"));
  }
  Device device;
  INFEMERAL_CUDA(cudaGetDevice(&device.index));
  cudaDeviceProp properties;
  INFEMERAL_CUDA(cudaGetDeviceProperties(&properties, device.index));
  if (properties.major * 10 + properties.minor < 75) {
    return absl::UnavailableError(cat("the GPU ", properties.name, " has compute capability ",
                                      properties.major, ".", properties.minor,
                                      " and 7.5 is needed"));
  }
  device.name = properties.name;
  cudaStream_t stream = nullptr;
  INFEMERAL_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  device.stream = Stream(stream);
  DeviceCode code;
  INFEMERAL_CUDA(probe_device_code(stream, code));
  device.stage = {.stream = stream,
                  .multiprocessors = properties.multiProcessorCount,
                  .shared_bytes = properties.sharedMemPerBlockOptin,
                  .overlap = code.architecture >= 90,
                  .warpgroups = code.warpgroups};
  return device;
}

}  // namespace infemeral::cuda
