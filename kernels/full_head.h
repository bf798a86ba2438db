// The full head: every logit in float16 weights and float32 arithmetic.
#pragma once

#include <cuda_fp16.h>

#include "kernels/layout.h"
#include "kernels/stage.h"

namespace infemeral::cuda {

struct FullHead {
  const __half* lm_head = nullptr;  // V x stride; device memory or mapped host memory
  int vocab_size = 0;
  int stride = 0;
  const float* states = nullptr;  // n x stride, zeros in the padding
  int n = 0;
  float* logits = nullptr;                // n x score_stride(V)
  unsigned long long* started = nullptr;  // receives the device time at which it begins
};

// A logit's bits depend on its row, its state and the stride alone (kernels/dot.cuh).
cudaError_t full_head(const Stage& stage, const FullHead& args);

}  // namespace infemeral::cuda
