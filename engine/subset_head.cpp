#include "engine/subset_head.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

namespace infemeral {

double subset_confidence(std::span<const float> scores, const SamplingParams& params) {
  float max = -std::numeric_limits<float>::infinity();
  for (float score : scores) max = std::max(max, score);  // skips NaN
  if (!std::isfinite(max)) return 0;
  const float flatten = params.greedy() ? 1.0f : std::min(params.temperature, 1.0f);
  std::uint64_t total = 0;
  for (float score : scores) {
    if (std::isnan(score)) return 0;
    total += probability_mass((score - max) * flatten, 0);
  }
  return 0x1p40 / static_cast<double>(total);  // probability_mass of the largest is 2^40
}

SubsetSampler::SubsetSampler(std::vector<std::int32_t> ids, std::size_t vocab_size)
    : ids_(std::move(ids)), vocab_size_(vocab_size) {}

std::optional<std::int32_t> SubsetSampler::sample(std::span<float> logits,
                                                  const SampleRequest& request) {
  scorer_.start(request, vocab_size_);
  candidates_.resize(ids_.size());
  for (std::size_t i = 0; i < ids_.size(); ++i) {
    logits[i] = scorer_.score(logits[i], ids_[i]);
    candidates_[i] = {logits[i], ids_[i]};
  }
  if (subset_confidence(logits, request.params) < kSubsetConfidence) return std::nullopt;
  return choose(candidates_, request, {});
}

}  // namespace infemeral
