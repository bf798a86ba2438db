#include "kernels/device_code.h"

#include "kernels/warpgroup.cuh"

namespace infemeral::cuda {
namespace {

__device__ bool has_warpgroups;

__global__ void probe_kernel() {
  has_warpgroups = kWarpgroupProducts;
}

}  // namespace

cudaError_t probe_device_code(cudaStream_t stream, DeviceCode& code) {
  cudaFuncAttributes attributes = {};
  cudaError_t error = cudaFuncGetAttributes(&attributes, probe_kernel);
  if (error != cudaSuccess) return error;
  code.architecture = attributes.ptxVersion;
  probe_kernel<<<1, 1, 0, stream>>>();
  error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  error = cudaMemcpyFromSymbolAsync(&code.warpgroups, has_warpgroups, sizeof code.warpgroups, 0,
                                    cudaMemcpyDeviceToHost, stream);
  return error == cudaSuccess ? cudaStreamSynchronize(stream) : error;
}

}  // namespace infemeral::cuda
