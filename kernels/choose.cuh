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
  int place;  // twice its id, and one more if the filters do not certainly keep it; -1: none
};
__device__ inline Choice from_lane_xor(const Choice& c, int offset) {
  return {cuda::from_lane_xor(c.score, offset), cuda::from_lane_xor(c.place, offset)};
}
__device__ inline Choice better(const Choice& a, const Choice& b) {
  if (b.place < 0) return a;
  return a.place >= 0 && (a.score > b.score || (a.score == b.score && a.place < b.place)) ? a : b;
}

// What is known about the tokens that are no candidates, whose mass a row's state has in units of
// exp(top); `max` is the largest candidate's score.
__device__ inline Rest rest_below(float max, float top, unsigned long long mass,
                                  std::uint32_t ceiling) {
  if (mass == 0) return no_rest();
  // What is added pays for the roundings; both are finite, and top is at most max.
  const float unit = expf(top - max) * (1 + 0x1p-15f);
  return {from_ordered(ceiling),
          static_cast<unsigned long long>(static_cast<double>(mass) * unit) + 1};
}

// Candidates bring their noise; of all tokens, those that are kept need it.
__device__ inline double noise_of(const Candidates& items, const RowRequest&, int i) {
  return items.noise(i);
}
__device__ inline double noise_of(const Everything& items, const RowRequest& request, int i) {
  return gumbel_noise(request, items.id(i));
}

// The token, or -1 when tokens that are not among the items could change it: rest(max) is what is
// known about those. Called by the whole block.
template <typename Items, typename RestBelow>
__device__ int choose_from(Items items, const RowRequest& request, const RestBelow& rest) {
  const bool greedy = request.selection == Selection::kGreedy;
  float max = -HUGE_VALF;
#pragma unroll 1
  for (int i = threadIdx.x; i < items.n; i += blockDim.x) max = fmaxf(max, items.score(i));
  max = block_reduce(max, -HUGE_VALF, Max());

  const bool draws = !greedy && isfinite(max);
  const bool filters = draws && (request.top_k > 0 || request.top_p < 1);
  const float floor = greedy  ? max
                      : draws ? max + logf(request.min_p)  // ln 0 is minus infinity
                              : -HUGE_VALF;
  const Rest left = filters ? rest(max) : no_rest();
  const Few* few = nullptr;
  Filtered filtered;
  if (filters && items.n <= kFew) {
    few = &share_few(items, request, max);
  } else if (filters) {
    items.know_max(max);
    filtered = filter_many(items, request, max, left);
  }

  // Who wins against all that may be kept, and certainly is, is the winner.
  Choice best = {0, -1};
#pragma unroll 1
  for (int place = threadIdx.x; place < (few == nullptr ? items.n : few->n); place += blockDim.x) {
    const int i = few == nullptr ? place : few->items[place];
    const float score = items.score(i);
    if (isnan(score)) continue;
    const Kept kept = few == nullptr ? filtered.of(score) : kept_of_few(*few, place, request, left);
    // Below min-p's floor, an item can still tell that the rest has kept ones; these may be above.
    if (kept == Kept::kNo || (score < floor && kept != Kept::kUnknown)) continue;
    Choice own = {score, 2 * items.id(i) + (kept != Kept::kYes ? 1 : 0)};
    if (draws) own.score += noise_of(items, request, i);
    if (kept == Kept::kUnknown) own.score = HUGE_VAL;
    best = better(own, best);
  }
  const int place = block_reduce(best, Choice{0, -1}, better).place;
  if (place < 0) return 0;  // nothing but NaN: as the CPU, the first
  return place % 2 == 0 ? place / 2 : -1;
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
