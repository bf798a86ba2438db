#include "kernels/cloak.h"

#include <cublas_v2.h>
#include <cusolverDn.h>

#include <algorithm>
#include <cstring>

#include "engine/text.h"
#include "kernels/cloak_kernels.h"
#include "kernels/rotate.h"

namespace infemeral::cuda {
namespace {

constexpr float kMaxOrthogonalityError = 1e-3f;
// Below it the host is done before cuSOLVER is ready.
constexpr std::size_t kMinDeviceSize = 1024;

cudaError_t destroy_cublas(cublasHandle_t handle) {
  return cublasDestroy(handle) == CUBLAS_STATUS_SUCCESS ? cudaSuccess : cudaErrorUnknown;
}
using Cublas = Handle<cublasHandle_t, destroy_cublas>;

absl::Status cublas_status(cublasStatus_t error, std::string_view what) {
  if (error == CUBLAS_STATUS_SUCCESS) return absl::OkStatus();
  if (error == CUBLAS_STATUS_ALLOC_FAILED) {
    return absl::ResourceExhaustedError(cat(what, ": the GPU has not enough free memory"));
  }
  return absl::InternalError(cat(what, ": ", cublasGetStatusString(error)));
}

cudaError_t destroy_cusolver(cusolverDnHandle_t handle) {
  return cusolverDnDestroy(handle) == CUSOLVER_STATUS_SUCCESS ? cudaSuccess : cudaErrorUnknown;
}
using Cusolver = Handle<cusolverDnHandle_t, destroy_cusolver>;

absl::Status cusolver_status(cusolverStatus_t error, std::string_view what) {
  if (error == CUSOLVER_STATUS_SUCCESS) return absl::OkStatus();
  if (error == CUSOLVER_STATUS_ALLOC_FAILED) {
    return absl::ResourceExhaustedError(cat(what, ": the GPU has not enough free memory"));
  }
  return absl::InternalError(cat(what, ": cuSOLVER error ", static_cast<int>(error)));
}

absl::Status check_orthogonal(const Stage& stage, std::size_t n, const __half* rows,
                              DeviceUsage& usage) {
  cublasHandle_t raw = nullptr;
  INFEMERAL_RETURN(cublas_status(cublasCreate(&raw), "cublasCreate"));
  const Cublas cublas(raw);
  INFEMERAL_RETURN(cublas_status(cublasSetStream(raw, stage.stream), "cublasSetStream"));
  auto product = Array<float>::make(Place::kDevice, n * n, usage);
  if (!product.ok()) return product.status();
  auto worst = Array<float>::make(Place::kDevice, 1, usage);
  if (!worst.ok()) return worst.status();
  const int size = static_cast<int>(n), stride = padded(size);
  const float one = 1, zero = 0;
  INFEMERAL_RETURN(cublas_status(
      cublasGemmEx(raw, CUBLAS_OP_T, CUBLAS_OP_N, size, size, size, &one, rows, CUDA_R_16F, stride,
                   rows, CUDA_R_16F, stride, &zero, product->data(), CUDA_R_32F, size,
                   CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
      "cublasGemmEx"));
  INFEMERAL_CUDA(identity_error(stage, product->data(), size, worst->data()));
  float error = 0;
  INFEMERAL_CUDA(
      cudaMemcpyAsync(&error, worst->data(), sizeof error, cudaMemcpyDeviceToHost, stage.stream));
  INFEMERAL_CUDA(cudaStreamSynchronize(stage.stream));
  if (error < kMaxOrthogonalityError) return absl::OkStatus();
  return absl::InternalError(cat("the cloak of size ", n, " is not orthogonal: max |QQ^T - I| is ",
                                 error, ", allowed is ", kMaxOrthogonalityError));
}

}  // namespace

absl::Status generate_cloak(const Stage& stage, const CloakSeed& seed, std::size_t n, __half* rows,
                            DeviceUsage& usage) {
  const cudaStream_t stream = stage.stream;
  const int size = static_cast<int>(n);
  // Column-major, as the keystream fills it and LAPACK wants it. Wiped when released.
  auto matrix = Array<double>::make(Place::kDevice, n * n, usage);
  if (!matrix.ok()) return matrix.status();
  {
    auto gaussians = Array<double>::make(Place::kPinned, n * n, usage);
    if (!gaussians.ok()) return gaussians.status();
    cloak_gaussians(seed, {gaussians->data(), n * n});
    INFEMERAL_CUDA(cudaMemcpyAsync(matrix->data(), gaussians->data(), gaussians->bytes(),
                                   cudaMemcpyHostToDevice, stream));
    INFEMERAL_CUDA(cudaStreamSynchronize(stream));
  }
  cusolverDnHandle_t raw = nullptr;
  INFEMERAL_RETURN(cusolver_status(cusolverDnCreate(&raw), "cusolverDnCreate"));
  const Cusolver handle(raw);
  INFEMERAL_RETURN(cusolver_status(cusolverDnSetStream(raw, stream), "cusolverDnSetStream"));
  auto tau = Array<double>::make(Place::kDevice, n, usage);
  if (!tau.ok()) return tau.status();
  int factor_size = 0, product_size = 0;
  INFEMERAL_RETURN(cusolver_status(
      cusolverDnDgeqrf_bufferSize(raw, size, size, matrix->data(), size, &factor_size),
      "cusolverDnDgeqrf"));
  INFEMERAL_RETURN(
      cusolver_status(cusolverDnDorgqr_bufferSize(raw, size, size, size, matrix->data(), size,
                                                  tau->data(), &product_size),
                      "cusolverDnDorgqr"));
  const int work_size = std::max(factor_size, product_size);
  auto work = Array<double>::make(Place::kDevice, static_cast<std::size_t>(work_size), usage);
  if (!work.ok()) return work.status();
  auto info = Array<int>::make(Place::kDevice, 1, usage);
  if (!info.ok()) return info.status();
  auto signs = Array<double>::make(Place::kDevice, n, usage);
  if (!signs.ok()) return signs.status();

  INFEMERAL_RETURN(
      cusolver_status(cusolverDnDgeqrf(raw, size, size, matrix->data(), size, tau->data(),
                                       work->data(), work_size, info->data()),
                      "cusolverDnDgeqrf"));
  INFEMERAL_CUDA(diagonal_signs(stage, matrix->data(), size, signs->data()));
  INFEMERAL_RETURN(
      cusolver_status(cusolverDnDorgqr(raw, size, size, size, matrix->data(), size, tau->data(),
                                       work->data(), work_size, info->data()),
                      "cusolverDnDorgqr"));
  INFEMERAL_CUDA(store_rounded(stage, matrix->data(), signs->data(), size, padded(size), rows));
  INFEMERAL_CUDA(cudaStreamSynchronize(stream));
  return check_orthogonal(stage, n, rows, usage);
}

absl::StatusOr<DeviceCloak> load_cloak(const Stage& stage, const ClientFolder& folder,
                                       DeviceUsage& usage) {
  const std::size_t n = folder.manifest.hidden_size, stride = padded(static_cast<int>(n));
  DeviceCloak cloak;
  Array<__half> rows;  // Q, row-major; wiped when released
  for (const auto& [array, size] : {std::pair{&rows, n * stride},
                                    {&cloak.packed, packed_size(static_cast<int>(n))},
                                    {&cloak.transposed, packed_size(static_cast<int>(n))}}) {
    auto made = Array<__half>::make(Place::kDevice, size, usage);
    if (!made.ok()) return made.status();
    *array = *std::move(made);
  }
  if (folder.manifest.cloak_mode == CloakMode::kLazy && n >= kMinDeviceSize) {
    INFEMERAL_RETURN(generate_cloak(stage, folder.seed, n, rows.data(), usage));
  } else {
    const absl::StatusOr<Cloak> host = folder.load_cloak();
    if (!host.ok()) return host.status();
    INFEMERAL_CUDA(cudaMemcpy2DAsync(rows.data(), stride * sizeof(__half), host->values().data(),
                                     n * sizeof(__half), n * sizeof(__half), n,
                                     cudaMemcpyHostToDevice, stage.stream));
    INFEMERAL_CUDA(cudaStreamSynchronize(stage.stream));
  }
  const int size = static_cast<int>(n);
  INFEMERAL_CUDA(pack_matrix(stage, rows.data(), size, false, cloak.packed.data()));
  INFEMERAL_CUDA(pack_matrix(stage, rows.data(), size, true, cloak.transposed.data()));
  INFEMERAL_CUDA(cudaStreamSynchronize(stage.stream));
  return cloak;
}

}  // namespace infemeral::cuda
