#include "engine/certified_head.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

namespace infemeral {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// x in whole numbers up to `limit`. The scale is a float and x - scale * q is the difference of two
// exact doubles, so the errors are those of the rounding that was really done.
template <typename Integer>
RoundingSums round_to_whole(std::span<const float> x, std::int32_t limit, std::span<Integer> q) {
  RoundingSums sums;
  double norm = 0;
  for (float value : x) {
    sums.largest = std::max(sums.largest, std::fabs(value));
    norm += static_cast<double>(value) * value;
  }
  sums.norm = norm_up(norm);
  const auto most = static_cast<float>(limit);
  sums.scale = sums.largest / most;
  if (!(sums.norm < kInfinity) || sums.scale == 0) {
    std::fill(q.begin(), q.end(), Integer{0});
    sums.scale = 0;
    sums.error = sums.norm = sums.norm < kInfinity ? sums.norm : kInfinity;
    return sums;
  }
  double error = 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    const float rounded = whole_steps(x[i], sums.scale, most);
    q[i] = static_cast<Integer>(rounded);
    const double kept = static_cast<double>(sums.scale) * rounded;
    error += (x[i] - kept) * (x[i] - kept);
  }
  sums.error = norm_up(error);
  return sums;
}

// The state's part of |(w - s q).(t v)|: outliers one by one, the rest by its norm.
void split_outliers(std::span<const std::int16_t> v, RoundingSums& sums) {
  double cut = std::numeric_limits<double>::infinity();
  for (int round = 0; round <= kOutlierRounds; ++round) {
    sums.outliers = sums.rest_squares = 0;
    for (std::int16_t value : v) {
      const double magnitude = std::fabs(static_cast<double>(value));
      magnitude > cut ? sums.outliers += magnitude : sums.rest_squares += magnitude * magnitude;
    }
    if (round == 0) sums.squares = sums.rest_squares;
    if (round < kOutlierRounds) cut = outlier_cut(sums.rest_squares, v.size());
  }
}

}  // namespace

std::string_view head_mode_name(HeadMode mode) {
  switch (mode) {
    case HeadMode::kCertified:
      return "certified";
    case HeadMode::kFull:
      return "full";
    case HeadMode::kInt8:
      return "int8";
    case HeadMode::kSubset:
      return "subset";
  }
  return "unknown";
}

std::optional<HeadMode> parse_head_mode(std::string_view name) {
  for (HeadMode mode :
       {HeadMode::kCertified, HeadMode::kFull, HeadMode::kInt8, HeadMode::kSubset}) {
    if (name == head_mode_name(mode)) return mode;
  }
  return std::nullopt;
}

RowBound quantise_row(std::span<const float> row, std::span<std::int8_t> q) {
  const RoundingSums sums = round_to_whole(row, kRowMax, q);
  return {.scale = sums.scale, .error = sums.error, .norm = sums.norm};
}

std::optional<StateBound> quantise_state(std::span<const float> state, float largest_norm,
                                         std::span<std::int16_t> v) {
  if (state.size() > kMaxCertifiedSize) return std::nullopt;
  RoundingSums sums = round_to_whole(state, kStateMax, v);
  if (!proof_covers(sums, state.size(), largest_norm)) return std::nullopt;
  split_outliers(v, sums);
  return state_bound(sums, state.size());
}

struct CertifiedSampler::Row {
  std::span<const float> lower;  // scores from here on
  std::span<const float> upper;
  float top;  // the largest of `lower`: no token below it is the likeliest
  const SampleRequest& request;
  const Rescore& rescore;
  HeadCounters& counters;

  // Beyond this many single rows the full head is cheaper.
  std::size_t limit() const { return std::max<std::size_t>(256, lower.size() / 4); }
};

// The full head's scores for candidates_ from index `first` on; false when they are too many.
bool CertifiedSampler::rescore_from(const Row& row, std::size_t first) {
  if (candidates_.size() > row.limit()) return false;
  const std::span<Candidate> fresh = std::span(candidates_).subspan(first);
  row.rescore(fresh);
  row.counters.rows_rescored += fresh.size();
  for (Candidate& c : fresh) c.score = scorer_.score(c.score, c.id);
  return true;
}

// Every token that can have a score of at least `threshold`.
bool CertifiedSampler::select(const Row& row, float threshold) {
  candidates_.clear();
  for (std::size_t i = 0; i < row.upper.size(); ++i) {
    if (row.upper[i] >= threshold) candidates_.push_back({0, static_cast<std::int32_t>(i)});
  }
  return rescore_from(row, 0);
}

// Every token that can win the draw without filters.
bool CertifiedSampler::select_gumbel(const Row& row) {
  const auto noise = [&](std::size_t id) {
    return gumbel_noise(row.request.params.seed, row.request.position,
                        static_cast<std::uint32_t>(id));
  };
  constexpr double kMostNoise = 23;  // -ln(-ln(1 - 2^-33)) is 22.87
  const auto likely = std::max_element(row.lower.begin(), row.lower.end());
  double best = *likely + noise(static_cast<std::size_t>(likely - row.lower.begin()));
  candidates_.clear();
  for (std::size_t i = 0; i < row.upper.size(); ++i) {
    if (row.upper[i] + kMostNoise < best) continue;
    const double g = noise(i);
    if (row.upper[i] + g < best) continue;
    best = std::max(best, row.lower[i] + g);
    candidates_.push_back({0, static_cast<std::int32_t>(i)});
  }
  std::erase_if(candidates_, [&](const Candidate& c) {
    const auto id = static_cast<std::size_t>(c.id);
    return row.upper[id] + noise(id) < best;
  });
  return rescore_from(row, 0);
}

// top-p over the whole vocabulary: a band of the likeliest tokens is rescored, the mass of the rest
// is bounded from above, bin by bin. The band grows until that mass does not matter to the cut.
std::optional<std::int32_t> CertifiedSampler::sample_nucleus(const Row& row) {
  constexpr std::size_t kBinsPerNat = 8;
  constexpr std::size_t kBins = 28 * kBinsPerNat + 1;  // exp(-28) is no unit of probability_mass
  struct Bin {
    std::uint32_t upper_ends = 0, lower_ends = 0;
    float ceiling = -kInfinity;  // the largest upper end
  };
  std::array<Bin, kBins> bins;
  const auto bin_of = [&](float score) {  // by the distance below row.top
    const float depth = std::max(0.0f, (row.top - score) * kBinsPerNat);
    return depth < kBins - 1 ? static_cast<std::size_t>(depth) : kBins - 1;
  };
  for (std::size_t i = 0; i < row.upper.size(); ++i) {
    Bin& bin = bins[bin_of(row.upper[i])];
    ++bin.upper_ends;
    bin.ceiling = std::max(bin.ceiling, row.upper[i]);
    ++bins[bin_of(row.lower[i])].lower_ends;
  }
  double total = 0;  // about the least that the probabilities can sum to, in units of exp(top)
  for (std::size_t b = 0; b < kBins; ++b) {
    total += bins[b].lower_ends * std::exp(-static_cast<double>(b + 1) / kBinsPerNat);
  }

  candidates_.clear();
  std::size_t edge = 0;  // bins below it are the band
  for (double share : {0x1p-6, 0x1p-9, 0x1p-13}) {
    std::size_t wider = kBins;
    double mass = 0;
    while (wider > 1) {  // the likeliest token is in bin 0
      const Bin& bin = bins[wider - 1];
      mass += bin.upper_ends * std::exp(static_cast<double>(bin.ceiling) - row.top);
      if (mass > share * total) break;
      --wider;
    }
    if (wider <= edge) continue;
    if (edge > 0) ++row.counters.widenings;
    const std::size_t known = candidates_.size();
    for (std::size_t i = 0; i < row.upper.size(); ++i) {
      const std::size_t bin = bin_of(row.upper[i]);
      if (bin >= edge && bin < wider) candidates_.push_back({0, static_cast<std::int32_t>(i)});
    }
    edge = wider;
    if (!rescore_from(row, known)) return std::nullopt;

    float max = -kInfinity;
    for (const Candidate& c : candidates_) max = std::max(max, c.score);
    Rest rest;
    for (std::size_t b = edge; b < kBins; ++b) {
      if (bins[b].upper_ends == 0) continue;
      rest.ceiling = std::max(rest.ceiling, bins[b].ceiling);
      // One unit a token: the library's exp is not known to be monotone to the last bit.
      rest.mass += bins[b].upper_ends * (probability_mass(bins[b].ceiling, max) + 1);
    }
    if (const auto token = choose(candidates_, row.request, rest)) return token;
  }
  return std::nullopt;
}

float CertifiedSampler::kth_largest(std::span<const float> values, std::size_t k) {
  scratch_.assign(values.begin(), values.end());
  const auto kth = scratch_.begin() + static_cast<std::ptrdiff_t>(k - 1);
  std::nth_element(scratch_.begin(), kth, scratch_.end(), std::greater<>());
  return *kth;
}

std::optional<std::int32_t> CertifiedSampler::certify(const Row& row) {
  const SamplingParams& params = row.request.params;
  const std::size_t k = static_cast<std::size_t>(params.top_k);
  const bool top_k = k > 0 && k < row.lower.size();
  const bool top_p = params.top_p < 1;

  bool complete = false;
  if (params.greedy()) {
    complete = select(row, row.top);
  } else if (top_p && !top_k) {
    return sample_nucleus(row);
  } else if (!top_k && params.min_p == 0) {
    complete = select_gumbel(row);
  } else {
    float threshold = top_k ? kth_largest(row.lower, k) : -kInfinity;
    // With top-p the tokens below min-p's floor still count in the normaliser.
    if (!top_p) threshold = std::max(threshold, min_p_floor(row.top, params.min_p));
    complete = select(row, threshold);
  }
  return complete ? choose(candidates_, row.request, {}) : std::nullopt;
}

std::optional<std::int32_t> CertifiedSampler::sample(std::span<float> lower, std::span<float> upper,
                                                     const SampleRequest& request,
                                                     const Rescore& rescore,
                                                     HeadCounters& counters) {
  // Scores stay finite: logits are below 2^100.
  const SamplingParams& params = request.params;
  const bool in_range =
      (params.greedy() || params.temperature >= 1e-4f) && params.repetition_penalty >= 1e-3f;
  std::optional<std::int32_t> token;
  if (in_range) {
    scorer_.start(request, lower.size());
    scorer_.score(lower);
    scorer_.score(upper);
    token = certify({.lower = lower,
                     .upper = upper,
                     .top = *std::max_element(lower.begin(), lower.end()),
                     .request = request,
                     .rescore = rescore,
                     .counters = counters});
  }
  return token;
}

}  // namespace infemeral
