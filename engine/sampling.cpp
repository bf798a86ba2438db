#include "engine/sampling.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
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

std::uint64_t noise_above(std::uint64_t seed, std::uint64_t position, std::uint32_t first,
                          std::size_t n, double least) {
  // -ln(u) >= 1 - u, so the noise is at most -ln(1 - u): below `least` where 1 - u > exp(-least).
  // The factor is for the roundings of both sides.
  const double rare = std::exp(-least) * (1 + 0x1p-20) * 0x1p32;
  std::uint64_t bits = 0;
  for (std::size_t i = 0; i < n; i += 4) {
    const PhiloxWords words =
        philox4x32(seed, position, (first + static_cast<std::uint32_t>(i)) / 4);
    for (std::size_t j = 0; j < 4 && i + j < n; ++j) {
      const bool above = static_cast<double>(~words.word[j]) + 0.5 <= rare;
      bits |= std::uint64_t{above} << (i + j);
    }
  }
  return bits;
}

double noise_needed(double best, float ceiling) {
  if (best == -std::numeric_limits<double>::infinity()) return best;
  return best - ceiling - (std::fabs(best) + std::fabs(ceiling)) * 0x1p-50;
}

void Scorer::start(const SampleRequest& request, std::size_t vocab_size) {
  const SamplingParams& params = request.params;
  penalty_ = params.repetition_penalty;
  inverse_temperature_ = params.greedy() ? 1.0f : 1.0f / params.temperature;
  seen_.clear();
  if (penalty_ == 1) return;
  seen_.assign((vocab_size + 63) / 64, 0);
  for (std::int32_t id : request.history) {
    const auto index = static_cast<std::size_t>(id);
    if (index < vocab_size) seen_[index / 64] |= std::uint64_t{1} << index % 64;
  }
}

float Scorer::penalised(float logit) const {
  return logit > 0 ? logit / penalty_ : logit * penalty_;
}

void Scorer::score(std::span<float> logits, std::size_t first) const {
  if (!seen_.empty()) {
    for (std::size_t begin = 0; begin < logits.size(); begin += 64) {
      for (std::uint64_t bits = seen_[(first + begin) / 64]; bits != 0; bits &= bits - 1) {
        const std::size_t i = begin + static_cast<std::size_t>(std::countr_zero(bits));
        if (i < logits.size()) logits[i] = penalised(logits[i]);
      }
    }
  }
  for (float& logit : logits) logit *= inverse_temperature_;
}

float Scorer::score(float logit, std::int32_t id) const {
  const auto index = static_cast<std::size_t>(id);
  const bool seen = !seen_.empty() && (seen_[index / 64] >> index % 64 & 1) != 0;
  return (seen ? penalised(logit) : logit) * inverse_temperature_;
}

std::uint64_t probability_mass(float score, float max) {
  return static_cast<std::uint64_t>(std::exp(static_cast<double>(score) - max) * 0x1p40);
}

float min_p_floor(float max, float min_p) {
  return max + std::log(min_p);  // ln 0 is minus infinity
}

namespace {

bool larger(const Candidate& a, const Candidate& b) {
  return a.score > b.score;
}

void keep_from(std::vector<Candidate>& candidates, float threshold) {
  std::erase_if(candidates, [=](const Candidate& c) { return c.score < threshold; });
}

// The largest scores, ties included: what is kept depends on the scores alone, not on their order.
void keep_top_k(std::vector<Candidate>& candidates, std::size_t k) {
  if (candidates.size() <= k) return;
  const auto kth = candidates.begin() + static_cast<std::ptrdiff_t>(k - 1);
  std::nth_element(candidates.begin(), kth, candidates.end(), larger);
  keep_from(candidates, kth->score);
}

// The least score of a nucleus: the smallest set of largest scores whose probability reaches top_p,
// ties with the last one included.
struct NucleusEnd {
  float certain;   // if the rest has no mass
  float possible;  // if it has all that it may have
};

// Only as many candidates are put in order as the nucleus needs: a partial sort that grows until it
// holds enough probability. nullopt when the rest could hold a score of the nucleus.
std::optional<NucleusEnd> find_nucleus(std::vector<Candidate>& candidates, double top_p, float max,
                                       const Rest& rest) {
  std::uint64_t total = 0;
  for (const Candidate& c : candidates) total += probability_mass(c.score, max);
  const double enough = top_p * static_cast<double>(total);
  const double enough_with_rest = top_p * static_cast<double>(total + rest.mass);

  std::uint64_t inside = 0;
  std::size_t sorted = 0;
  std::optional<float> certain;
  for (std::size_t want = 64; sorted < candidates.size(); want *= 4) {
    const auto begin = candidates.begin() + static_cast<std::ptrdiff_t>(sorted);
    const std::size_t end = std::min(candidates.size(), want);
    std::partial_sort(begin, candidates.begin() + static_cast<std::ptrdiff_t>(end),
                      candidates.end(), larger);
    for (; sorted < end; ++sorted) {
      const float score = candidates[sorted].score;
      if (score <= rest.ceiling) return std::nullopt;
      inside += probability_mass(score, max);
      if (!certain && static_cast<double>(inside) >= enough) certain = score;
      if (certain && static_cast<double>(inside) >= enough_with_rest) {
        return NucleusEnd{*certain, score};
      }
    }
  }
  return std::nullopt;
}

// Gumbel-max among the scores from `floor` on, or the plain maximum for a greedy request; of equals
// the lowest id.
Candidate draw(std::span<const Candidate> candidates, float floor, const SampleRequest& request) {
  Candidate best = {0, -1};
  double best_score = 0;
  for (const Candidate& c : candidates) {
    if (c.score < floor) continue;
    double score = c.score;
    if (!request.params.greedy()) {
      score +=
          gumbel_noise(request.params.seed, request.position, static_cast<std::uint32_t>(c.id));
    }
    if (best.id < 0 || score > best_score || (score == best_score && c.id < best.id)) {
      best = c;
      best_score = score;
    }
  }
  return best;
}

}  // namespace

std::optional<std::int32_t> choose(std::vector<Candidate>& candidates, const SampleRequest& request,
                                   const Rest& rest) {
  const SamplingParams& params = request.params;
  constexpr float kNone = -std::numeric_limits<float>::infinity();
  NucleusEnd end = {kNone, kNone};
  float floor = kNone;
  if (!params.greedy()) {
    const float max = std::min_element(candidates.begin(), candidates.end(), larger)->score;
    if (params.top_k > 0) keep_top_k(candidates, static_cast<std::size_t>(params.top_k));
    if (params.top_p < 1) {
      const auto found = find_nucleus(candidates, params.top_p, max, rest);
      if (!found) return std::nullopt;
      end = *found;
    }
    // Commutes with top-k, as both keep a prefix of the order; before top-p it would change the
    // normaliser.
    floor = std::max(end.possible, min_p_floor(max, params.min_p));
  }
  // Who wins against all that the nucleus may hold, and is certainly one of it, is the winner.
  const Candidate winner = draw(candidates, floor, request);
  if (winner.score < end.certain) return std::nullopt;
  return winner.id;
}

float largest_of(std::span<const float> values) {
  // Eight at a time, which the compiler makes vectors of.
  constexpr std::size_t kLanes = 8;
  constexpr float kLeast = -std::numeric_limits<float>::infinity();
  float top[kLanes] = {kLeast, kLeast, kLeast, kLeast, kLeast, kLeast, kLeast, kLeast};
  std::size_t i = 0;
  for (; i + kLanes <= values.size(); i += kLanes) {
    for (std::size_t j = 0; j < kLanes; ++j) {
      top[j] = values[i + j] > top[j] ? values[i + j] : top[j];
    }
  }
  float largest = kLeast;
  for (; i < values.size(); ++i) largest = values[i] > largest ? values[i] : largest;
  for (float t : top) largest = t > largest ? t : largest;
  return largest;
}

std::int32_t Sampler::sample(std::span<float> logits, const SampleRequest& request) {
  constexpr std::size_t kBlock = 64;
  constexpr float kNone = -std::numeric_limits<float>::infinity();
  const SamplingParams& params = request.params;
  scorer_.start(request, logits.size());
  scorer_.score(logits);
  const std::span<const float> scores = logits;
  const auto block = [&](std::size_t b) {
    return scores.subspan(b * kBlock, std::min(kBlock, scores.size() - b * kBlock));
  };
  block_tops_.resize((scores.size() + kBlock - 1) / kBlock);
  std::size_t top_block = 0;
  for (std::size_t b = 0; b < block_tops_.size(); ++b) {
    block_tops_[b] = largest_of(block(b));
    if (block_tops_[b] > block_tops_[top_block]) top_block = b;
  }
  const float max = block_tops_[top_block];
  const auto argmax = [&] {
    const std::span<const float> s = block(top_block);
    const auto first = std::find(s.begin(), s.end(), max) - s.begin();
    return first < static_cast<std::ptrdiff_t>(s.size())
               ? static_cast<std::int32_t>(top_block * kBlock + static_cast<std::size_t>(first))
               : 0;
  };
  if (params.greedy() || !std::isfinite(max)) return argmax();

  // Only tokens that the filters might keep, or that might win the draw, need to be looked at.
  candidates_.clear();
  const std::size_t k = static_cast<std::size_t>(params.top_k);
  const bool top_k = k > 0 && k < scores.size(), top_p = params.top_p < 1;
  if (!top_k && !top_p && params.min_p == 0) {
    const std::int32_t likely = argmax();
    const double best =
        max + gumbel_noise(params.seed, request.position, static_cast<std::uint32_t>(likely));
    for (std::size_t b = 0; b < block_tops_.size(); ++b) {
      if (block_tops_[b] == kNone) continue;
      const std::span<const float> s = block(b);
      std::uint64_t bits =
          noise_above(params.seed, request.position, static_cast<std::uint32_t>(b * kBlock),
                      s.size(), noise_needed(best, block_tops_[b]));
      for (; bits != 0; bits &= bits - 1) {
        const auto i = static_cast<std::size_t>(std::countr_zero(bits));
        const auto id = static_cast<std::int32_t>(b * kBlock + i);
        if (s[i] > kNone && id != likely) candidates_.push_back({s[i], id});
      }
    }
    candidates_.push_back({max, likely});
    return *choose(candidates_, request, {});
  }
  float floor = kNone;
  if (top_k && k <= block_tops_.size()) {
    // k blocks reach the k-th largest of their maxima, so the k-th largest score is not below it.
    scratch_ = block_tops_;
    const auto kth = scratch_.begin() + static_cast<std::ptrdiff_t>(k - 1);
    std::nth_element(scratch_.begin(), kth, scratch_.end(), std::greater<>());
    floor = *kth;
  }
  if (!top_p) {
    floor = std::max(floor, min_p_floor(max, params.min_p));
  } else if (std::fabs(max) < 0x1p18f) {
    // exp(-28) is no unit of probability_mass: such tokens are in no nucleus and no sum.
    floor = std::max(floor, max - 28);
  }
  for (std::size_t b = 0; b < block_tops_.size(); ++b) {
    if (!(block_tops_[b] >= floor)) continue;
    const std::span<const float> s = block(b);
    for (std::size_t i = 0; i < s.size(); ++i) {
      if (s[i] >= floor) candidates_.push_back({s[i], static_cast<std::int32_t>(b * kBlock + i)});
    }
  }
  return choose(candidates_, request, {}).value_or(argmax());
}

}  // namespace infemeral
