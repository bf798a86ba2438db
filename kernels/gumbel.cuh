// The noise whose largest sum with a score is the token that was drawn (the Gumbel-max trick), as
// engine/sampling.h defines it.
#pragma once

#include <curand_kernel.h>

#include <cstdint>

#include "kernels/common.cuh"
#include "kernels/head_types.h"

namespace infemeral::cuda {

// The 32 random bits of a token: cuRAND's Philox, with the counters of engine/sampling.h.
__device__ inline std::uint32_t random_bits(const RowRequest& request, int token) {
  const auto block = static_cast<unsigned>(token) / 4;
  const uint4 words = curand_Philox4x32_10(
      make_uint4(block, 0, static_cast<unsigned>(request.position),
                 static_cast<unsigned>(request.position >> 32)),
      make_uint2(static_cast<unsigned>(request.seed), static_cast<unsigned>(request.seed >> 32)));
  switch (token % 4) {
    case 0:
      return words.x;
    case 1:
      return words.y;
    case 2:
      return words.z;
    default:
      return words.w;
  }
}

__device__ INFEMERAL_ONE_COPY double gumbel_noise(const RowRequest& request, int token) {
  const double uniform = (random_bits(request, token) + 0.5) * 0x1p-32;  // never 0 or 1
  return -log(-log(uniform));
}

// The same in float32, for telling who cannot win: within kNoiseError of it. Near 1 the logarithm
// is taken of the distance to 1, which float32 can hold.
inline constexpr float kNoiseError = 1e-3f;
inline constexpr float kMostNoise = 23;  // -ln(-ln(1 - 2^-33)) is 22.87; the least is -3.14
__device__ INFEMERAL_ONE_COPY float gumbel_noise_near(const RowRequest& request, int token) {
  const std::uint32_t bits = random_bits(request, token);
  const float log_uniform = bits >> 31 ? log1pf(-(static_cast<float>(~bits) + 0.5f) * 0x1p-32f)
                                       : logf((static_cast<float>(bits) + 0.5f) * 0x1p-32f);
  return -logf(-log_uniform);
}

}  // namespace infemeral::cuda
