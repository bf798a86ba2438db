#include "kernels/device_code.h"

namespace infemeral::cuda {
namespace {

__global__ void probe_kernel() {}

}  // namespace

cudaError_t probe_device_code(cudaStream_t stream, int& architecture) {
  cudaFuncAttributes attributes = {};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe_kernel);
  if (error != cudaSuccess) return error;
  architecture = attributes.ptxVersion;
  probe_kernel<<<1, 1, 0, stream>>>();
  const cudaError_t launched = cudaGetLastError();
  return launched == cudaSuccess ? cudaStreamSynchronize(stream) : launched;
}

}  // namespace infemeral::cuda
