// A state in whole numbers of two bytes, and what its intervals are made of.
#pragma once

#include <cstdint>

#include "engine/certified_bound.h"
#include "kernels/common.cuh"

namespace infemeral::cuda {

// The threads that round a state together: the first Threads of a block.
template <int Threads>
__device__ void sync_threads() {
  asm volatile("bar.sync 1, %0;" ::"n"(Threads) : "memory");
}

// Values combined over those threads, in every thread.
template <int Threads, int N, typename Op>
__device__ inline void combine(float (&values)[N], Op op) {
  constexpr int kWarps = Threads / kWarp;
  __shared__ float partial[kWarps][N];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const auto reduce = [&](int lanes) {
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
#pragma unroll
      for (float& value : values) {
        value = op(value, __shfl_xor_sync(0xffffffffu, value, offset));
      }
    }
  };
  reduce(kWarp);
  sync_threads<Threads>();  // an earlier call may still read
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (lane == 0) partial[warp][i] = values[i];
  }
  sync_threads<Threads>();
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = partial[lane % kWarps][i];
  reduce(kWarps);
}

// Sums of floats that are not negative, in a tree, and their roots: a few hundred roundings at most
// for every state that fits a device, which this factor covers.
inline constexpr double kSumSlack = 1 + 0x1p-14;

// Rounds the state y to whole numbers and hands each value's high and low byte to write(i, high,
// low). True when the proof covers the state; `bound` is then set in thread 0. A barrier of these
// threads lies between the writes and the return. All sums are in units of the state's scale, where
// nothing overflows and nothing that counts underflows.
template <int Threads, typename Write>
__device__ inline bool round_state(const float* y, int n, float largest_norm, const Write& write,
                                   StateBound& bound) {
  constexpr int kKept = 4096 / Threads;  // values that a thread keeps; it makes more of them anew
  float kept[kKept];
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    const int i = threadIdx.x + k * Threads;
    kept[k] = i < n ? y[i] : 0;
  }
  float largest[1] = {0};
#pragma unroll
  for (int k = 0; k < kKept; ++k) largest[0] = fmaxf(largest[0], fabsf(kept[k]));
  for (int i = threadIdx.x + kKept * Threads; i < n; i += Threads) {
    largest[0] = fmaxf(largest[0], fabsf(y[i]));
  }
  combine<Threads>(largest, Max());
  RoundingSums sums;
  sums.largest = largest[0];
  const auto most = static_cast<float>(kStateMax);
  sums.scale = sums.largest / most;
  // Below it nothing is covered, and scales could be subnormal.
  const bool divides = sums.largest >= 0x1p-60f && isfinite(sums.largest);
  const float inverse = divides ? 1 / sums.scale : 0;
  // A product instead of engine/certified_bound.h's quotient may round a tie the other way. Any
  // whole numbers will do: the error is that of those which were really taken.
  const auto whole = [&](float x) { return fminf(fmaxf(nearest_whole(x * inverse), -most), most); };
  float squares[3] = {0, 0, 0};  // of the state, of its error, of the whole numbers
  const auto round_one = [&](int i, float x) {
    const float steps = whole(x);
    const float in_units = x * inverse, error = fmaf(-sums.scale, steps, x) * inverse;
    squares[0] = fmaf(in_units, in_units, squares[0]);
    squares[1] = fmaf(error, error, squares[1]);
    squares[2] = fmaf(steps, steps, squares[2]);
    const auto v = static_cast<std::int32_t>(steps);
    const std::int32_t low = ((v + 128) & 255) - 128;
    write(i, static_cast<std::byte>((v - low) >> 8), static_cast<std::byte>(low));
    return steps;
  };
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    const int i = threadIdx.x + k * Threads;
    if (i < n) kept[k] = round_one(i, kept[k]);
  }
  for (int i = threadIdx.x + kKept * Threads; i < n; i += Threads) round_one(i, y[i]);
  combine<Threads>(squares, Sum());

  float split[2] = {0, squares[2]};  // the outliers' sum, the others' squares
  for (int round = 0; round < kOutlierRounds; ++round) {
    // Any cut is a valid one: float32 will do.
    const float cut = sqrtf(12 / static_cast<float>(n) * split[1]);
    float next[2] = {0, 0};
    const auto add = [&](float steps) {
      const float magnitude = fabsf(steps);
      const bool outlier = magnitude > cut;
      next[0] += outlier ? magnitude : 0.0f;
      next[1] = fmaf(magnitude, outlier ? 0.0f : magnitude, next[1]);
    };
#pragma unroll
    for (int k = 0; k < kKept; ++k) add(kept[k]);
    for (int i = threadIdx.x + kKept * Threads; i < n; i += Threads) add(whole(y[i]));
    combine<Threads>(next, Sum());
    const bool settled = next[0] == split[0];
    split[0] = next[0];
    split[1] = next[1];
    if (settled) break;
  }
  const auto root = [&](float sum) {
    return round_up(kSumSlack * sqrtf(sum) * static_cast<double>(sums.scale));
  };
  sums.norm = root(squares[0]);
  if (!divides || !proof_covers(sums, n, largest_norm)) return false;
  if (threadIdx.x == 0) {
    sums.error = root(squares[1]);
    sums.squares = kSumSlack * squares[2];
    sums.outliers = kSumSlack * split[0];
    sums.rest_squares = kSumSlack * split[1];
    bound = state_bound(sums, n);
  }
  return true;
}

}  // namespace infemeral::cuda
