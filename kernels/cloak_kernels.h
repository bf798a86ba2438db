// The device code of making a cloak.
#pragma once

#include <cuda_fp16.h>

#include "kernels/stage.h"

namespace infemeral::cuda {

// signs[j] = the sign of r[j, j], for a column-major n x n matrix.
cudaError_t diagonal_signs(const Stage& stage, const double* r, int n, double* signs);
// out[i, j] = q[i, j] * signs[j] in float16; q column-major n x n, out row-major with that stride.
cudaError_t store_rounded(const Stage& stage, const double* q, const double* signs, int n,
                          int stride, __half* out);
// *worst = the largest |product[i, j] - (i == j)|; product n x n. *worst must be 0.
cudaError_t identity_error(const Stage& stage, const float* product, int n, float* worst);

}  // namespace infemeral::cuda
