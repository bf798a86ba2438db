#include "cpu/int8_head.h"

#include <algorithm>
#include <array>

namespace infemeral {
namespace {

// Rows of lm_head whose products with all states are taken before the next ones are read.
constexpr std::size_t kBlockRows = 64;

}  // namespace

Int8Head::Int8Head(const Matrix& lm_head, const simd::Kernels& kernels, ThreadPool& pool)
    : kernels_(kernels),
      pool_(pool),
      rows_(lm_head.rows),
      cols_(lm_head.cols),
      values_(std::make_unique_for_overwrite<std::int8_t[]>(rows_ * cols_)),
      row_bounds_(rows_) {
  pool_.for_ranges(rows_, linear_grain(1, cols_), 1, [&](const Range& range) {
    std::vector<float> wide(cols_);
    for (std::size_t row = range.begin; row < range.end; ++row) {
      const std::byte* halves = lm_head.data + row * lm_head.row_bytes();
      kernels_.from_f16(reinterpret_cast<const std::uint16_t*>(halves), cols_, wide.data());
      row_bounds_[row] = quantise_row(wide, {values_.get() + row * cols_, cols_});
    }
  });
  for (const RowBound& row : row_bounds_) largest_norm_ = std::max(largest_norm_, row.norm);
}

void Int8Head::load(const Rows& states, std::size_t m) {
  states_.resize(m * cols_);
  bounds_.resize(m);
  for (std::size_t i = 0; i < m; ++i) {
    bounds_[i] = quantise_state({states[i], cols_}, largest_norm_, {&states_[i * cols_], cols_});
  }
}

template <typename Use>
void Int8Head::product(const Use& use) {
  pool_.for_ranges(rows_, linear_grain(bounds_.size(), cols_), 1, [&](const Range& range) {
    std::array<std::int64_t, kBlockRows> dots;
    for (std::size_t begin = range.begin; begin < range.end; begin += kBlockRows) {
      const std::size_t n = std::min(kBlockRows, range.end - begin);
      for (std::size_t state = 0; state < bounds_.size(); ++state) {
        if (!covers(state)) continue;
        kernels_.dot_i8({.w = values_.get() + begin * cols_,
                         .ldw = cols_,
                         .y = &states_[state * cols_],
                         .out = dots.data(),
                         .n = n,
                         .k = cols_});
        for (std::size_t j = 0; j < n; ++j) use(state, begin + j, dots[j]);
      }
    }
  });
}

void Int8Head::intervals(const Rows& lower, const Rows& upper) {
  product([&](std::size_t state, std::size_t row, std::int64_t dot) {
    const float centre = approximate_logit(dot, row_bounds_[row], *bounds_[state]);
    const float radius = logit_radius(row_bounds_[row], *bounds_[state]);
    lower[state][row] = centre - radius;
    upper[state][row] = centre + radius;
  });
}

void Int8Head::approximate(const Rows& logits) {
  product([&](std::size_t state, std::size_t row, std::int64_t dot) {
    logits[state][row] = approximate_logit(dot, row_bounds_[row], *bounds_[state]);
  });
}

}  // namespace infemeral
