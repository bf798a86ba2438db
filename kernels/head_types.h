// What host and device tell each other about the rows of one call, and what the stages of the head
// hand on. Plain data: the host writes and reads pinned memory that the device sees too.
#pragma once

#include <cstdint>

#include "engine/certified_bound.h"

namespace infemeral::cuda {

inline constexpr int kMaxRows = 32;             // states in one pass over the weights
inline constexpr int kMaxCandidates = 1 << 14;  // tokens of one row that can be rescored
// Scores are sorted into bins by their depth below the row's best lower end, 1/8 each. The last bin
// holds everything deeper than 28, which matters to no choice: e^-28 is no unit of
// probability_mass, and the noise of two tokens differs by 26.1 at most.
inline constexpr int kBinsPerNat = 8;
inline constexpr int kBins = 28 * kBinsPerNat + 1;

// Which tokens can be chosen, and so which rows must be known exactly.
enum class Selection : std::int32_t {
  kGreedy,    // those that can be the largest
  kMinP,      // those that can reach min-p's floor
  kTopK,      // those that can be among the k largest
  kNucleus,   // top-p over the whole vocabulary: a band that holds the nucleus
  kUnlimited  // temperature alone: those that can win with their Gumbel noise
};

// Whose threshold depends on more than the largest score and what a block sees for itself.
inline constexpr bool needs_scan(Selection selection) {
  return selection == Selection::kTopK;
}
// Who reads lower ends but the largest. Of others they are not written.
inline constexpr bool needs_lower_ends(Selection selection) {
  return selection == Selection::kTopK || selection == Selection::kUnlimited;
}

struct RowRequest {  // host -> device
  float inverse_temperature;
  float repetition_penalty;
  float top_p;
  float min_p;
  std::int32_t top_k;  // 0: off
  Selection selection;
  std::uint64_t seed;
  std::uint64_t position;
  std::uint32_t sequence;  // comes back with the result
};

enum class Outcome : std::int32_t {
  kToken,      // `token` is the row's token
  kUncertain,  // the proof does not hold or not pay: run the full head
  kNotFinite   // the returned row has a NaN or an infinity
};

// Device times in nanoseconds at which a row's stages began, and the end.
struct StageTimes {
  unsigned long long decode, uncloak, de_embed, sample, end;
};

struct RowResult {  // device -> host
  std::int32_t token;
  Outcome outcome;
  std::uint32_t rows_rescored;
  StageTimes times;
  std::uint32_t sequence;  // written last
};

// One row on its way through the stages; decode clears it.
struct RowState {
  RowRequest request;
  StageTimes times;
  StateBound bound;
  std::int32_t finite;
  std::int32_t covered;  // the proof holds for this state
  // From here on: what forget_candidates forgets.
  unsigned long long top;     // ordered(largest lower end, its token)
  unsigned long long best;    // kGreedy: ordered(score, token) of the best candidate so far
  std::uint32_t claimed;      // row 0: pieces of lm_head that blocks have claimed
  std::uint32_t candidates;   // found so far; may pass kMaxCandidates
  std::uint32_t blocks_done;  // kGreedy: of select
  // kNucleus: what is known about the tokens that are no candidates, but for those deeper than 28,
  // which have no probability. Their masses sum to rest_mass at most, in units of 2^-40 of
  // exp(largest lower end); 0: there are none. No score is above ordered(rest_ceiling).
  unsigned long long rest_mass;
  std::uint32_t rest_ceiling;
  std::uint32_t lower_ends[kBins];  // kTopK: of the row's intervals
};

// A token that may be chosen, and its Gumbel noise (not told for greedy rows).
struct alignas(16) Candidate {
  float score;
  std::int32_t id;
  double noise;
};

}  // namespace infemeral::cuda
