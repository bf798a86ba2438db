#include "cpu/int8_head.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <limits>

namespace infemeral {
namespace {

// Rows of lm_head whose products with all states are taken before the next ones are read.
constexpr std::size_t kBlockRows = CertifiedSampler::kBlock;

}  // namespace

Int8Head::Int8Head(const Matrix& lm_head, const simd::Kernels& kernels, ThreadPool& pool,
                   const std::function<void(double done, double total)>& progress)
    : kernels_(kernels),
      pool_(pool),
      rows_(lm_head.rows),
      cols_(lm_head.cols),
      values_(rows_ * cols_),
      row_bounds_(rows_) {
  std::atomic<std::size_t> done = 0;
  pool_.for_ranges(rows_, linear_grain(1, cols_), 1, [&](const Range& range) {
    for (std::size_t row = range.begin; row < range.end; ++row) {
      row_bounds_[row] = round_row(lm_head.row(row).data, values_.data() + row * cols_);
    }
    done += range.end - range.begin;
    if (progress && range.worker == 0) {
      progress(static_cast<double>(done), static_cast<double>(rows_));
    }
  });
  for (const RowBound& row : row_bounds_) largest_norm_ = std::max(largest_norm_, row.norm);
}

// engine/certified_head.h's quantise_row, with the same q and scale, in vectors.
RowBound Int8Head::round_row(const std::byte* row, std::int8_t* q) const {
  const auto* halves = reinterpret_cast<const std::uint16_t*>(row);
  double squares = 0;
  const float largest = kernels_.row_range(halves, cols_, &squares);
  const float scale = largest / static_cast<float>(kRowMax);
  const bool finite = squares < std::numeric_limits<double>::infinity();
  if (!finite || scale == 0) {
    std::fill_n(q, cols_, std::int8_t{0});
    const float norm = finite ? 0 : std::numeric_limits<float>::infinity();
    return {.scale = 0, .error = norm, .norm = norm};
  }
  return row_bound(scale, squares, kernels_.round_row(halves, cols_, scale, q));
}

void Int8Head::load(const Rows& states, std::size_t m) {
  states_.resize(m * cols_);
  planes_.resize(2 * m * cols_);
  bounds_.resize(m);
  covered_.clear();
  whole_.clear();
  for (std::size_t i = 0; i < m; ++i) {
    const std::span<std::int16_t> values(&states_[i * cols_], cols_);
    bounds_[i] = quantise_state({states[i], cols_}, largest_norm_, values);
    if (!covers(i)) continue;
    std::int8_t* high = &planes_[2 * i * cols_];
    std::int8_t* low = high + cols_;
    std::int64_t sum = 0;
    for (std::size_t j = 0; j < cols_; ++j) {
      low[j] = static_cast<std::int8_t>(values[j] & 255);
      high[j] = static_cast<std::int8_t>((values[j] - low[j]) / 256);
      sum += values[j];
    }
    covered_.push_back(i);
    whole_.push_back({.values = values.data(), .high = high, .low = low, .sum = sum});
  }
}

template <typename Use>
void Int8Head::product(const Use& use) {
  const std::size_t m = whole_.size();
  if (m == 0) return;
  pool_.for_ranges(rows_, linear_grain(m, cols_), kBlockRows, [&](const Range& range) {
    std::vector<std::int64_t> dots(m * kBlockRows);
    for (std::size_t begin = range.begin; begin < range.end; begin += kBlockRows) {
      const std::size_t n = std::min(kBlockRows, range.end - begin);
      kernels_.dot_i8({.w = values_.data() + begin * cols_,
                       .ldw = cols_,
                       .states = whole_.data(),
                       .out = dots.data(),
                       .ldo = kBlockRows,
                       .m = m,
                       .n = n,
                       .k = cols_});
      for (std::size_t i = 0; i < m; ++i) {
        use(covered_[i], range.worker, begin, std::span(dots).subspan(i * kBlockRows, n));
      }
    }
  });
}

void Int8Head::intervals(UseIntervals use) {
  product([&](std::size_t state, std::size_t worker, std::size_t first,
              std::span<const std::int64_t> dots) {
    std::array<float, kBlockRows> lower, upper;
    for (std::size_t j = 0; j < dots.size(); ++j) {
      const RowBound& row = row_bounds_[first + j];
      const float centre = approximate_logit(dots[j], row, *bounds_[state]);
      const float radius = logit_radius(row, *bounds_[state]);
      lower[j] = centre - radius;
      upper[j] = centre + radius;
    }
    use(state, worker, first, {lower.data(), dots.size()}, {upper.data(), dots.size()});
  });
}

void Int8Head::approximate(const Rows& logits) {
  product(
      [&](std::size_t state, std::size_t, std::size_t first, std::span<const std::int64_t> dots) {
        for (std::size_t j = 0; j < dots.size(); ++j) {
          logits[state][first + j] =
              approximate_logit(dots[j], row_bounds_[first + j], *bounds_[state]);
        }
      });
}

}  // namespace infemeral
