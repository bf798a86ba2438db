// The int8 copy of lm_head on the CPU, and what its product says about the full head's logits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "cpu/linear.h"
#include "cpu/parallel.h"
#include "cpu/simd/kernels.h"
#include "engine/certified_head.h"

namespace infemeral {

// Borrows the kernels and the pool. One caller at a time. V rows of H values.
class Int8Head {
 public:
  // Rounds every row of `lm_head` (f16): reads it once, on all threads.
  Int8Head(const Matrix& lm_head, const simd::Kernels& kernels, ThreadPool& pool);

  std::size_t bytes() const { return rows_ * (cols_ + sizeof(RowBound)); }

  // Rounds m states (rows of H) for the calls below. What was loaded before is forgotten.
  void load(const Rows& states, std::size_t m);
  // Whether the proof covers state i; if not, the calls below leave its row alone.
  bool covers(std::size_t i) const { return bounds_[i].has_value(); }

  // Intervals that hold the logits which `matmul` of these kernels gives; rows of V.
  void intervals(const Rows& lower, const Rows& upper);
  // The logits that the int8 product stands for; rows of V.
  void approximate(const Rows& logits);

 private:
  // Calls use(state, row, dot) for every loaded state and row of lm_head, from several threads.
  template <typename Use>
  void product(const Use& use);

  const simd::Kernels& kernels_;
  ThreadPool& pool_;
  const std::size_t rows_, cols_;                  // V, H
  std::unique_ptr<std::int8_t[]> values_;          // V x H
  std::vector<RowBound> row_bounds_;               // V
  float largest_norm_ = 0;                         // of a row
  std::vector<std::int16_t> states_;               // m x H
  std::vector<std::optional<StateBound>> bounds_;  // m
};

}  // namespace infemeral
