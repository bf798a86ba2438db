// Where the rounding to the wire's format hangs on a sum's last bits.
//
// A row on the wire is x * Q with every sum exact, then rounded to float32 and to the format: the
// same bytes (in f32 but for a value in a million) whichever backend, instruction set or number of
// rows made them, so that the same prompt sends the same rows to the body. A backend's own sums are
// up to 2^-23 of |x| off, in an order of their own, which in f16 and i8 matters to a value only
// where it lies that near to an edge between two codes. Those few are summed again without
// rounding, and in f32 all are: cpu/simd/kernels.h and kernels/exact_dot.cuh.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "engine/certified_bound.h"
#include "engine/host_device.h"

namespace infemeral {

// Whether a number of steps, less than 2^22, lies within `reach` of the middle between two whole
// ones.
INFEMERAL_HOST_DEVICE inline bool near_middle(float steps, float reach) {
  const float from_middle = steps - 0.5f;
  return (reach > 0.25f) | (fabsf(from_middle - nearest_whole(from_middle)) <= reach);
}

// Whether numbers within `error` of x can round to different binary16 numbers, the two zeros among
// them. False for NaN.
INFEMERAL_HOST_DEVICE inline bool near_f16_edge(float x, float error) {
  const float magnitude = fabsf(x);
  int32_t bits = 0;
  memcpy(&bits, &magnitude, sizeof bits);
  // Below 2^-14 binary16 has the steps of [2^-14, 2^-13): 2^-24, as everywhere 2^-10 of a binade.
  constexpr int32_t kBias = 127, kLeast = kBias - 14;
  const int32_t exponent = bits >> 23 > kLeast ? bits >> 23 : kLeast;
  const int32_t inverse_bits = (2 * kBias + 10 - exponent) << 23;  // 1 / step
  float inverse = 0;
  memcpy(&inverse, &inverse_bits, sizeof inverse);
  return (magnitude < error) | near_middle(magnitude * inverse, error * inverse);  // < 2^11 steps
}

// The scale of a block in int8 is binary16 too, of its largest magnitude / 127. First those that
// can be the largest are to be exact, where that decides the scale, ...
INFEMERAL_HOST_DEVICE inline bool near_scale_edge(float largest, float error) {
  return near_f16_edge(largest / 127, error / 127 + largest * 0x1p-30f);
}
INFEMERAL_HOST_DEVICE inline bool can_be_largest(float x, float largest, float error) {
  return fabsf(x) >= largest - 2 * error;
}
// ... and then, with the scale, those whose code is open.
INFEMERAL_HOST_DEVICE inline bool near_i8_edge(float x, float inverse_scale, float error) {
  const float steps = fabsf(x) * inverse_scale;
  return near_middle(steps, error * inverse_scale + steps * 0x1p-22f);  // and that of the product
}

}  // namespace infemeral
