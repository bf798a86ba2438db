// The arithmetic of the certified head's proof, for every backend: engine/certified_head.h derives
// it. Plain functions without library types, so that device compilers read this header too.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/host_device.h"

namespace infemeral {

// A row of lm_head beside its int8 values.
struct RowBound {
  float scale = 0;  // s
  float error = 0;  // |w - s q|
  float norm = 0;   // |w|
};

struct StateBound {
  float scale = 0;         // t
  float scale_factor = 0;  // a: of RowBound::scale
  float error_factor = 0;  // b: of RowBound::error
  float norm_factor = 0;   // c: of RowBound::norm
};

inline constexpr int32_t kRowMax = 127;  // the largest |q|
// The largest |v|: as two signed bytes, v = 256 * high + low, for devices that multiply bytes.
inline constexpr int32_t kStateMax = 127 * 256 + 127;
inline constexpr size_t kMaxCertifiedSize = size_t{1} << 20;  // values in a state, at most

// The logit that the int8 product stands for: s t D.
INFEMERAL_HOST_DEVICE inline float approximate_logit(int64_t dot, const RowBound& row,
                                                     const StateBound& state) {
  return static_cast<float>(dot) * (row.scale * state.scale);
}

// How far from it the full head's float32 logit can be. Roundings here and in the sums
// approximate_logit +- radius are covered.
INFEMERAL_HOST_DEVICE inline float logit_radius(const RowBound& row, const StateBound& state) {
  return row.scale * state.scale_factor + row.error * state.error_factor +
         row.norm * state.norm_factor;
}

// The nearest whole number, for |x| < 2^22; vectorises on any machine.
INFEMERAL_HOST_DEVICE inline float nearest_whole(float x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23 leaves no room for a fraction
  return (x + kMagic) - kMagic;
}

// x in steps of `scale`, at most `limit` of them.
INFEMERAL_HOST_DEVICE inline float whole_steps(float x, float scale, float limit) {
  return fminf(fmaxf(nearest_whole(x / scale), -limit), limit);
}

INFEMERAL_HOST_DEVICE inline float round_up(double x) {
  const auto rounded = static_cast<float>(x);
  return rounded >= x ? rounded : nextafterf(rounded, HUGE_VALF);
}

// A float that is not below the root of `squares`, a sum in double of at most 2^20 terms, each of
// which is within a few 2^-53 of its value.
INFEMERAL_HOST_DEVICE inline float norm_up(double squares) {
  return round_up(sqrt(squares) * (1 + 0x1p-30));
}

// The bound of a row from sums that were taken in float32: `squares` of w, `error_squares` of
// w - s q, each within 2^-16 of the sum of its terms. The terms of the second have the roundings of
// s q, up to 2^-24 |s q| each if it was not fused, and of the difference; and |s q| <= 2 |w|.
INFEMERAL_HOST_DEVICE inline RowBound row_bound(float scale, double squares, double error_squares) {
  constexpr double kSums = 1 + 0x1p-15;
  RowBound bound;
  bound.scale = scale;
  bound.norm = round_up(sqrt(squares) * kSums);
  bound.error = round_up(sqrt(error_squares) * kSums + 0x1p-22 * static_cast<double>(bound.norm));
  return bound;
}

// Where a state's outliers begin, from the sum of squares of the elements that were none so far.
// Rounding errors spread evenly have |w - s q| = s sqrt(n / 12). Then an element is better taken
// alone when it is above sqrt(12 / n) times the norm of what is left. Any cut is a valid one; it
// sinks as the outliers leave, and hardly moves after kOutlierRounds.
inline constexpr int kOutlierRounds = 4;
INFEMERAL_HOST_DEVICE inline double outlier_cut(double squares, size_t n) {
  return sqrt(12 / static_cast<double>(n) * squares);
}

// What rounding a row or a state to whole numbers leaves behind; the last three for states only.
struct RoundingSums {
  float largest = 0;        // |y_j|
  float norm = 0;           // |y|, rounded up
  float scale = 0;          // t
  float error = 0;          // |y - t v|, rounded up
  double squares = 0;       // sum of v_j^2
  double outliers = 0;      // sum of |v_j| over the outliers
  double rest_squares = 0;  // sum of v_j^2 over the others
};

// Whether the proof covers a state of n values against rows up to `largest_norm`. Written so that
// NaN fails too. Products stay far from overflow; and the sum's rounding, at least
// n 2^-24 |w| 2^-60 with |w| >= 2^-24, far above what underflow can take away, which is 2^-126 in
// each of 2n operations on devices that flush subnormals to zero.
INFEMERAL_HOST_DEVICE inline bool proof_covers(const RoundingSums& sums, size_t n,
                                               float largest_norm) {
  return n <= kMaxCertifiedSize && sums.largest >= 0x1p-60f &&
         static_cast<double>(largest_norm) * sums.norm <= 0x1p100;
}

INFEMERAL_HOST_DEVICE inline StateBound state_bound(const RoundingSums& sums, size_t n) {
  constexpr double kUnitRoundoff = 0x1p-24;
  const double nu = static_cast<double>(n) * kUnitRoundoff;
  const double sum_error = nu / (1 - nu);
  // approximate_logit has three roundings and adding the radius one more, of numbers up to
  // |s q| |t v|; and |s q| <= 2 |w|, since q is nearest: no element's error is above the element.
  constexpr double kCentreRoundings = 9 * kUnitRoundoff;
  // Covers the roundings of logit_radius itself and of the sums here, underflow, and that the
  // rounding to whole numbers is done in float32: half a step and 2^-16 of one.
  constexpr double kSlack = 1 + 0x1p-12;
  const double scale = sums.scale;
  StateBound bound;
  bound.scale = sums.scale;
  bound.scale_factor = round_up(kSlack * 0.5 * sums.outliers * scale);
  bound.error_factor = round_up(kSlack * sqrt(sums.rest_squares) * scale);
  bound.norm_factor =
      round_up(kSlack * (sums.error + sum_error * static_cast<double>(sums.norm) +
                         kCentreRoundings * static_cast<double>(norm_up(sums.squares)) * scale));
  return bound;
}

}  // namespace infemeral
