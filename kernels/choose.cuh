// Filters and draw among the candidates of a row, by one block, and the result to the host.
#pragma once

#include "kernels/common.cuh"
#include "kernels/filters.cuh"
#include "kernels/gumbel.cuh"
#include "kernels/sample.h"

namespace infemeral::cuda {

// The larger score; of equals the lower id.
struct Choice {
  double score;
  int id;
};
__device__ inline Choice from_lane_xor(const Choice& c, int offset) {
  return {cuda::from_lane_xor(c.score, offset), cuda::from_lane_xor(c.id, offset)};
}
__device__ inline Choice better(const Choice& a, const Choice& b) {
  if (b.id < 0) return a;
  return a.id >= 0 && (a.score > b.score || (a.score == b.score && a.id < b.id)) ? a : b;
}

// This thread's part of what lies beyond the band that the candidates come from: bin threadIdx.x.
__device__ inline Rest rest_in(const Bin& bin, std::uint32_t edge, float max) {
  if (threadIdx.x < edge || threadIdx.x >= kBins - 1 || bin.upper_ends == 0) return no_rest();
  const float ceiling = from_ordered(bin.ceiling);
  // One unit a token: exp is not known to be monotone to the last bit.
  return {ceiling, bin.upper_ends * (probability_mass(ceiling, max) + 1)};
}

// The token, or -1 when tokens that are not among the items could change it: rest(max) is this
// thread's part of those. Called by the whole block.
template <typename Items, typename RestBelow>
__device__ int choose_from(Items items, const RowRequest& request, const RestBelow& rest) {
  const bool greedy = request.selection == Selection::kGreedy;
  float max = -HUGE_VALF;
#pragma unroll 1
  for (int i = threadIdx.x; i < items.n; i += blockDim.x) max = fmaxf(max, items.score(i));
  max = block_reduce(max, -HUGE_VALF, Max());

  float floor = -HUGE_VALF;
  const bool filters = request.top_k > 0 || request.top_p < 1;
  if (!greedy && isfinite(max)) {
    if (filters) items.know_max(max);
    const Filtered kept = !filters          ? Filtered{}
                          : items.n <= kFew ? filter_few(items, request, rest(max))
                                            : filter_many(items, request, max, rest(max));
    if (kept.rest.mass > 0) {
      const double enough = request.top_p * static_cast<double>(kept.total + kept.rest.mass);
      if (kept.floor <= kept.rest.ceiling || static_cast<double>(kept.inside) < enough) return -1;
    }
    floor = fmaxf(kept.floor, max + logf(request.min_p));  // ln 0 is minus infinity
  }

  Choice best = {0, -1};
#pragma unroll 1
  for (int i = threadIdx.x; i < items.n; i += blockDim.x) {
    const float score = items.score(i);
    if (isnan(score) || score < floor || (greedy && score < max)) continue;
    const int id = items.id(i);
    Choice own = {score, id};
    if (!greedy && isfinite(max)) own.score += gumbel_noise(request, id);
    best = better(own, best);
  }
  const int token = block_reduce(best, Choice{0, -1}, better).id;
  return token < 0 ? 0 : token;  // nothing but NaN: as the CPU, the first
}

// More would not pay, where they must be rescored.
__device__ inline int candidate_limit(const Sample& p) {
  return p.known ? kMaxCandidates : min(kMaxCandidates, max(256, p.vocab_size / 4));
}

// What a result tells beside the token. Read as early as it is known: each look at the state is a
// trip to the L2 cache.
struct Ending {
  StageTimes times;
  std::uint32_t candidates;
  std::uint32_t sequence;
};
__device__ inline Ending ending_of(const volatile RowState& state) {
  return {{state.times.decode, state.times.uncloak, state.times.de_embed, state.times.sample, 0},
          state.candidates,
          state.request.sequence};
}

__device__ inline bool has_candidates(const Sample& p, std::uint32_t n) {
  return n > 0 && n <= static_cast<std::uint32_t>(candidate_limit(p));
}

// The row's result to the host; by one thread. A token below 0 is uncertain.
__device__ inline void finish(const Sample& p, int row, int token, bool finite,
                              const Ending& ending) {
  const Outcome outcome = !finite     ? Outcome::kNotFinite
                          : token < 0 ? Outcome::kUncertain
                                      : Outcome::kToken;
  p.tokens[row] = max(token, 0);
  RowResult& result = p.results[row];
  result.token = max(token, 0);
  result.outcome = outcome;
  result.rows_rescored = outcome == Outcome::kToken && !p.known ? ending.candidates : 0;
  result.times = ending.times;
  result.times.end = global_ns();
  __threadfence_system();
  *static_cast<volatile std::uint32_t*>(&result.sequence) = ending.sequence;
}

}  // namespace infemeral::cuda
