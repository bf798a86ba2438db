// Sampling: from one row of logits to a token id, without sorting the vocabulary.
//
// The order of the stages is Hugging Face's: repetition penalty, temperature, top-k, top-p, min-p.
// What survives is sampled by the Gumbel-max trick: the winner is argmax(logit_i / T + g_i), where
// g_i = -ln(-ln(u_i)) and u_i comes from Philox4x32-10 keyed by (seed, position, token id). The
// draw is exact, needs no normaliser, and depends on neither backend, batching nor thread count.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <vector>

#include "absl/status/status.h"

namespace infemeral {

struct SamplingParams {
  float temperature = 0;  // 0 (or below 1e-5, where nothing but the maximum is left): greedy;
                          // the filters below then do not matter
  int top_k = 0;          // keep the k largest logits (and ties with the k-th); 0: off
  float top_p = 1;        // keep the smallest set with probability >= top_p; 1: off
  float min_p = 0;        // drop tokens below min_p times the largest probability; 0: off
  float repetition_penalty = 1;  // Hugging Face's: logits of seen tokens are divided (or, when
                                 // negative, multiplied) by it; 1: off
  std::uint64_t seed = 0;

  bool greedy() const { return temperature < 1e-5f; }
};

// InvalidArgument, naming the field, when a value is outside its range or not finite.
absl::Status validate(const SamplingParams& params);

// Four 32-bit words of Philox4x32-10 (Salmon et al., SC11, "Parallel random numbers: as easy as
// 1, 2, 3"), with the counter layout of cuRAND: words 4*block .. 4*block+3 of subsequence
// `subsequence` under `seed`.
struct PhiloxWords {
  std::uint32_t word[4];
};
PhiloxWords philox4x32(std::uint64_t seed, std::uint64_t subsequence, std::uint64_t block);

// The Gumbel noise of a token at a position: a function of its three arguments alone.
double gumbel_noise(std::uint64_t seed, std::uint64_t position, std::uint32_t token);

// Which of the tokens first, ..., first + n - 1 can have a noise of at least `least`: few more than
// have. Bit i for token first + i. n <= 64; first is a multiple of 4. Cheap: takes no logarithms.
std::uint64_t noise_above(std::uint64_t seed, std::uint64_t position, std::uint32_t first,
                          std::size_t n, double least);

// The noise that lifts a score of at most `ceiling` to `best`, or a little less: sums with noise
// are rounded, which matters where scores are large.
double noise_needed(double best, float ceiling);

// One row of the head's work.
struct SampleRequest {
  SamplingParams params;
  std::uint64_t position = 0;  // of the token to be chosen, counted from the prompt's start
  std::span<const std::int32_t> history;  // tokens so far, for the repetition penalty; valid ids
};

// What the repetition penalty and the temperature make of a logit: its score. Both are monotone in
// floating point too, so a scorer maps bounds of logits to bounds of scores. Greedy requests have
// temperature 1 here. One a thread; start() begins a row.
class Scorer {
 public:
  void start(const SampleRequest& request, std::size_t vocab_size);
  // Of the tokens first, first + 1, ...; in place. `first` is a multiple of 64.
  void score(std::span<float> logits, std::size_t first = 0) const;
  float score(float logit, std::int32_t id) const;

 private:
  float penalised(float logit) const;

  float penalty_ = 1;
  float inverse_temperature_ = 1;
  std::vector<std::uint64_t> seen_;  // a bit for each id of the history; empty without a penalty
};

// A token that may be chosen.
struct Candidate {
  float score;
  std::int32_t id;
};

// exp(score - max) in units of 2^-40, for score <= max. Whole numbers: their sums do not depend on
// the order of addition, so a nucleus does not depend on how its candidates were found. A row of
// 2^24 tokens cannot overflow the sum.
std::uint64_t probability_mass(float score, float max);

// The least score that min-p keeps; minus infinity when it is off.
float min_p_floor(float max, float min_p);

// What is known about the tokens of a row that are not among the candidates.
struct Rest {
  float ceiling = -std::numeric_limits<float>::infinity();  // no score above it
  std::uint64_t mass = 0;  // the sum of their probability_mass, at most
};

// The filters and the draw: the token that the whole row would give, from candidates that include
// every token which the filters could keep. Only top-p without top-k asks about the rest: nullopt
// when the token depends on where in [0, rest.mass] the rest's mass lies, or when a score of the
// rest may be in the nucleus. Then the candidates are in another order and complete. At least one
// candidate, none with a NaN.
std::optional<std::int32_t> choose(std::vector<Candidate>& candidates, const SampleRequest& request,
                                   const Rest& rest);

// Chooses a token from `logits` (one per vocabulary entry, at least one; overwritten as scratch).
// NaN logits are never chosen; ties go to the lowest id. Keeps its buffers between calls: one
// Sampler per thread.
class Sampler {
 public:
  std::int32_t sample(std::span<float> logits, const SampleRequest& request);

 private:
  Scorer scorer_;
  std::vector<float> block_tops_;  // the largest score of every 64 tokens
  std::vector<float> scratch_;
  std::vector<Candidate> candidates_;
};

// The largest of up to 64 values; NaN is none of them. Minus infinity when there is none.
float largest_of(std::span<const float> values);

}  // namespace infemeral
