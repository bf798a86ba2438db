// The subset head: scores only the tokens of a subset (engine/token_subset.h), in float16, and asks
// the full head when it is not confident. Cheap, and without a proof: docs/certified-head.md says
// what it costs in tokens.
//
// Everything here is plain arithmetic on the subset's logits, for every backend. The backend
// computes those logits with the kernel of its full head, so that an accepted token's logit has the
// full head's bits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "engine/sampling.h"

namespace infemeral {

// How sure the subset's own distribution is of its likeliest token: that token's share of
// sum(exp(score)) over the subset, between 0 and 1. `scores` are what Scorer makes of the subset's
// logits. A temperature below 1 is taken out again: it sharpens any distribution, which is no
// evidence. One above 1 stays in: it moves mass to the tail, most of which is outside the subset.
//
// It says nothing about the tokens outside: one of them may have the largest logit of all. That a
// model which is sure inside the subset rarely prefers something outside is an observation.
//
// The sum is taken in whole numbers (probability_mass), so that it depends on no order of addition.
// 0 when a score is NaN or the largest one is not finite: nothing is accepted then.
double subset_confidence(std::span<const float> scores, const SamplingParams& params);

// What is accepted without the full head.
inline constexpr double kSubsetConfidence = 0.9;

// One a thread; keeps its buffers.
class SubsetSampler {
 public:
  // ids: as load_token_subset gives them, below vocab_size.
  SubsetSampler(std::vector<std::int32_t> ids, std::size_t vocab_size);

  // The tokens whose rows of lm_head the backend multiplies with, in this order.
  std::span<const std::int32_t> ids() const { return ids_; }

  // logits[i] is that of ids()[i]; overwritten by its score. The token that the usual filters and
  // the usual draw give on the subset alone, when its confidence is at least kSubsetConfidence;
  // else nullopt: run the full head then.
  std::optional<std::int32_t> sample(std::span<float> logits, const SampleRequest& request);

 private:
  const std::vector<std::int32_t> ids_;
  const std::size_t vocab_size_;
  Scorer scorer_;
  std::vector<Candidate> candidates_;
};

}  // namespace infemeral
