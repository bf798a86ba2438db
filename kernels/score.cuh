// What the repetition penalty and the temperature make of a logit: engine/sampling.h's Scorer.
#pragma once

#include "kernels/common.cuh"
#include "kernels/head_types.h"

namespace infemeral::cuda {

struct Scorer {
  float penalty;
  float inverse_temperature;
  const std::uint32_t* seen;  // a bit a token; read only with a penalty

  __device__ Scorer(float repetition_penalty, float inverse, const std::uint32_t* seen_bits)
      : penalty(repetition_penalty), inverse_temperature(inverse), seen(seen_bits) {}
  __device__ Scorer(const RowRequest& request, const std::uint32_t* seen_bits)
      : Scorer(request.repetition_penalty, request.inverse_temperature, seen_bits) {}
  __device__ float operator()(float logit, int id) const {
    if (penalty != 1 && (seen[id / 32] >> (id % 32) & 1) != 0) {
      logit = logit > 0 ? logit / penalty : logit * penalty;
    }
    return logit * inverse_temperature;
  }
};

}  // namespace infemeral::cuda
