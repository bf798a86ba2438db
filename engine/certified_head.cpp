#include "engine/certified_head.h"

#include <algorithm>
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

}  // namespace infemeral
