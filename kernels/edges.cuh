// How deep the candidates of top-k and top-p go, by the bins that their scores' ends are in. For a
// block of kDigits threads, each with the bin of its index: tokens whose upper ends are in bins
// below the edge are candidates. Tests compile this for the host too (tests/emulated_block.h).
#pragma once

#include "kernels/block.cuh"
#include "kernels/filters.cuh"
#include "kernels/head_types.h"

namespace infemeral::cuda {

__device__ inline int bin_of(float top, float score) {
  const float depth = fmaxf(0.0f, (top - score) * kBinsPerNat);
  return depth < kBins - 1 ? static_cast<int>(depth) : kBins - 1;
}

// Holds every token that top-k can keep: an interval that begins below the edge is above all that
// end beyond, and k of them do. When fewer than k begin within reach, tokens out of reach cannot
// win the draw anyway, and have no probability. `counts`: of the lower ends.
__device__ inline int top_k_edge(int top_k, std::uint32_t* counts) {
  __shared__ int edge;
  if (threadIdx.x == 0) edge = kBins - 1;
  __syncthreads();
  running_sums<kDigits>(counts);
  const auto k = static_cast<std::uint32_t>(top_k);
  const int b = threadIdx.x;
  if (b < kBins - 1 && counts[b] >= k && (b == 0 || counts[b - 1] < k)) edge = b + 1;
  __syncthreads();
  return edge;
}

// The upper ends of a block's part of a row.
struct Depth {
  std::uint32_t inside;       // how many there are down to a bin
  unsigned long long beyond;  // the mass of the bins behind, at most; counted from the deepest
  __device__ Depth& operator+=(const Depth& other) {
    inside += other.inside;
    beyond += other.beyond;
    return *this;
  }
};
__device__ inline Depth from_lane_below(const Depth& d, int offset) {
  return {cuda::from_lane_below(d.inside, offset), cuda::from_lane_below(d.beyond, offset)};
}

// The least that is above the mass of a token in this bin, in units of 2^-40 of exp(top). What is
// added pays for the roundings of bin_of and of expf.
__device__ inline unsigned long long most_mass(int bin) {
  const float share = expf(-static_cast<float>(bin) / kBinsPerNat) * (1 + 0x1p-15f);
  return static_cast<unsigned long long>(share * 0x1p40f) + 1;
}

// The band of top-p: as narrow as a block's part of the row may become without more mass outside
// than its share of what the proof can do without. What is outside goes to the row's rest. kBins
// when that takes more than `limit` tokens. What the proof can do without is a guess: choose looks
// at the rest of all blocks. `counts`: of the upper ends. `known`: they are scores, and a candidate
// costs little.
__device__ inline int nucleus_edge(const std::uint32_t* counts, float top_p, float top, int limit,
                                   bool known, RowState& state) {
  // Outside, as a share of all mass: about the probability that the token depends on it, and less
  // than what top-p leaves out.
  constexpr int kTries = 3;
  const float least_share = fminf(0x1p-5f, (1 - top_p) / 3) * (known ? 0x1p-5f : 1);
  const float step = known ? 8 : 2;
  // The row's mass is guessed from the block's: the likeliest token, and of the others those that
  // are so many that all blocks have about as much of them: from 2 below it.
  constexpr int kCommon = 2 * kBinsPerNat;
  __shared__ Depth depths[kDigits];
  __shared__ int edges[kTries];
  const int b = threadIdx.x, from_deepest = kBins - 1 - b;
  const std::uint32_t deep = from_deepest >= 0 ? counts[from_deepest] : 0;
  depths[b] = {counts[b], deep * most_mass(from_deepest)};
  if (b < kTries) edges[b] = kBins;
  __syncthreads();
  running_sums<kDigits>(depths);
  const auto beyond = [&](int edge) { return depths[kBins - 1 - edge].beyond; };
  const float all = 0x1p40f / gridDim.x + static_cast<float>(beyond(kCommon));
  if (b < kBins && (b == 0 || depths[b - 1].inside <= static_cast<std::uint32_t>(limit))) {
    const auto from_here = static_cast<float>(beyond(b));
    const float with_one_more = b > 0 ? static_cast<float>(beyond(b - 1)) : HUGE_VALF;
    float most = least_share * all;
    for (int i = 0; i < kTries; ++i, most *= step) {
      if (from_here <= most && with_one_more > most) edges[i] = b;
    }
  }
  __syncthreads();
  // The smallest share that the limit allows.
  const int edge = edges[0] < kBins ? edges[0] : edges[1] < kBins ? edges[1] : edges[2];
  if (b >= edge && b < kBins - 1 && counts[b] > 0 &&
      (b == 0 || depths[b - 1].inside == (edge > 0 ? depths[edge - 1].inside : 0))) {
    // The largest outside: at most where its bin begins.
    const float depth = static_cast<float>(b) / kBinsPerNat * (1 - 0x1p-20f);
    atomicMax(&state.rest_ceiling, ordered(__fsub_ru(top, depth)));
    atomicAdd(&state.rest_mass, beyond(edge));
  }
  return edge;
}

}  // namespace infemeral::cuda
