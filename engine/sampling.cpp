#include "engine/sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "engine/text.h"

namespace infemeral {

absl::Status validate(const SamplingParams& p) {
  const auto out_of_range = [](const char* name, auto value, const char* range) {
    return absl::InvalidArgumentError(cat(name, " is ", value, "; it must be ", range));
  };
  // Written so that NaN fails too.
  if (!(p.temperature >= 0 && p.temperature <= 100)) {
    return out_of_range("temperature", p.temperature, "between 0 and 100");
  }
  if (p.top_k < 0) return out_of_range("top_k", p.top_k, "0 (off) or more");
  if (!(p.top_p > 0 && p.top_p <= 1)) return out_of_range("top_p", p.top_p, "above 0 and up to 1");
  if (!(p.min_p >= 0 && p.min_p <= 1)) return out_of_range("min_p", p.min_p, "between 0 and 1");
  if (!(p.repetition_penalty > 0 && p.repetition_penalty <= 100)) {
    return out_of_range("repetition_penalty", p.repetition_penalty, "above 0 and up to 100");
  }
  return absl::OkStatus();
}

PhiloxWords philox4x32(std::uint64_t seed, std::uint64_t subsequence, std::uint64_t block) {
  std::uint32_t key0 = static_cast<std::uint32_t>(seed);
  std::uint32_t key1 = static_cast<std::uint32_t>(seed >> 32);
  std::uint32_t c0 = static_cast<std::uint32_t>(block);
  std::uint32_t c1 = static_cast<std::uint32_t>(block >> 32);
  std::uint32_t c2 = static_cast<std::uint32_t>(subsequence);
  std::uint32_t c3 = static_cast<std::uint32_t>(subsequence >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t product0 = 0xD2511F53ull * c0;
    const std::uint64_t product1 = 0xCD9E8D57ull * c2;
    c0 = static_cast<std::uint32_t>(product1 >> 32) ^ c1 ^ key0;
    c1 = static_cast<std::uint32_t>(product1);
    c2 = static_cast<std::uint32_t>(product0 >> 32) ^ c3 ^ key1;
    c3 = static_cast<std::uint32_t>(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

double gumbel_noise(std::uint64_t seed, std::uint64_t position, std::uint32_t token) {
  const PhiloxWords words = philox4x32(seed, position, token / 4);
  const double uniform = (words.word[token % 4] + 0.5) * 0x1p-32;  // never 0 or 1
  return -std::log(-std::log(uniform));
}

// The largest logits, ties included: what is kept depends on the logits alone, not on their order.
void Sampler::keep_top_k(std::size_t k) {
  if (candidates_.size() <= k) return;
  const auto kth = candidates_.begin() + static_cast<std::ptrdiff_t>(k - 1);
  std::nth_element(candidates_.begin(), kth, candidates_.end(),
                   [](const Candidate& a, const Candidate& b) { return a.logit > b.logit; });
  const float threshold = kth->logit;
  std::erase_if(candidates_, [=](const Candidate& c) { return c.logit < threshold; });
}

// The smallest set of largest candidates whose probability reaches top_p, ties with the last one
// included. Candidate.logit is relative to the maximum and divided by the temperature. Only as many
// candidates are put in order as the nucleus needs: a partial sort that doubles until it holds
// enough probability.
void Sampler::keep_top_p(double top_p) {
  double total = 0;
  for (const Candidate& c : candidates_) total += std::exp(static_cast<double>(c.logit));

  const auto larger = [](const Candidate& a, const Candidate& b) { return a.logit > b.logit; };
  double inside = 0;
  std::size_t sorted = 0;
  for (std::size_t want = 64; sorted < candidates_.size(); want *= 4) {
    const auto begin = candidates_.begin() + static_cast<std::ptrdiff_t>(sorted);
    const std::size_t end = std::min(candidates_.size(), want);
    std::partial_sort(begin, candidates_.begin() + static_cast<std::ptrdiff_t>(end),
                      candidates_.end(), larger);
    for (; sorted < end; ++sorted) {
      inside += std::exp(static_cast<double>(candidates_[sorted].logit));
      if (inside >= top_p * total) {
        const float threshold = candidates_[sorted].logit;
        std::erase_if(candidates_, [=](const Candidate& c) { return c.logit < threshold; });
        return;
      }
    }
  }
}

std::int32_t Sampler::draw(const SampleRequest& request) const {
  std::int32_t best = -1;
  double best_score = 0;
  for (const Candidate& c : candidates_) {
    const double score = c.logit + gumbel_noise(request.params.seed, request.position,
                                                static_cast<std::uint32_t>(c.id));
    if (best < 0 || score > best_score || (score == best_score && c.id < best)) {
      best = c.id;
      best_score = score;
    }
  }
  return best;
}

std::int32_t Sampler::sample(std::span<float> logits, const SampleRequest& request) {
  const SamplingParams& params = request.params;
  if (params.repetition_penalty != 1) {
    seen_.assign(logits.size(), false);
    for (std::int32_t id : request.history) {
      const auto index = static_cast<std::size_t>(id);
      if (index >= logits.size() || seen_[index]) continue;
      seen_[index] = true;
      float& logit = logits[index];
      logit = logit > 0 ? logit / params.repetition_penalty : logit * params.repetition_penalty;
    }
  }

  std::int32_t argmax = 0;
  float max = -std::numeric_limits<float>::infinity();
  for (std::size_t i = 0; i < logits.size(); ++i) {
    if (logits[i] > max) {
      max = logits[i];
      argmax = static_cast<std::int32_t>(i);
    }
  }
  if (params.greedy() || !std::isfinite(max)) return argmax;

  // min-p first, as a floor on the scan: it commutes with top-k (both keep a prefix of the order),
  // and with top-p it must not come before, since it would change the normaliser.
  // Relative to the maximum, so that a tiny temperature cannot overflow.
  const double inverse_t = 1.0 / params.temperature;
  const bool nucleus = params.top_p < 1;
  const float floor =
      params.min_p > 0 ? std::log(params.min_p) : -std::numeric_limits<float>::infinity();
  candidates_.clear();
  for (std::size_t i = 0; i < logits.size(); ++i) {
    const auto scaled = static_cast<float>((double{logits[i]} - max) * inverse_t);
    if (nucleus ? !std::isnan(scaled) : scaled >= floor) {
      candidates_.push_back({scaled, static_cast<std::int32_t>(i)});
    }
  }
  if (params.top_k > 0) keep_top_k(static_cast<std::size_t>(params.top_k));
  if (nucleus) {
    keep_top_p(params.top_p);
    std::erase_if(candidates_, [=](const Candidate& c) { return c.logit < floor; });
  }
  const std::int32_t token = draw(request);
  return token < 0 ? argmax : token;
}

}  // namespace infemeral
