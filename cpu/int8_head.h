// The int8 copy of lm_head on the CPU, and what its product says about the full head's logits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "absl/functional/function_ref.h"
#include "cpu/aligned.h"
#include "cpu/huge_pages.h"
#include "cpu/linear.h"
#include "cpu/parallel.h"
#include "cpu/simd/kernels.h"
#include "engine/certified_head.h"

namespace infemeral {

// Borrows the kernels and the pool. One caller at a time. V rows of H values.
class Int8Head {
 public:
  // Rounds every row of `lm_head` (f16): reads it once, on all threads. Says how many rows are done
  // now and then, one call at a time.
  Int8Head(const Matrix& lm_head, const simd::Kernels& kernels, ThreadPool& pool,
           const std::function<void(double done, double total)>& progress = {});

  // Overwrites the copy, for rows that are secret. Nothing else may be called afterwards.
  void wipe() { values_.wipe(); }

  std::size_t bytes() const { return rows_ * (cols_ + sizeof(RowBound)); }

  // Rounds m states (rows of H) for the calls below. What was loaded before is forgotten.
  void load(const Rows& states, std::size_t m);
  // Whether the proof covers state i; if not, the calls below leave its row alone.
  bool covers(std::size_t i) const { return bounds_[i].has_value(); }

  // Intervals that hold the logits which `matmul` of these kernels gives: of every covered state
  // once, in blocks of at most CertifiedSampler::kBlock rows from a multiple of it on. Called from
  // several threads, each with its own `worker` below the pool's number of threads.
  using UseIntervals =
      absl::FunctionRef<void(std::size_t state, std::size_t worker, std::size_t first_row,
                             std::span<float> lower, std::span<float> upper)>;
  void intervals(UseIntervals use);
  // The logits that the int8 product stands for; rows of V.
  void approximate(const Rows& logits);

 private:
  RowBound round_row(const std::byte* row, std::int8_t* q) const;

  // Calls use(state, worker, first_row, dots) for every covered state and block of rows, from
  // several threads.
  template <typename Use>
  void product(const Use& use);

  const simd::Kernels& kernels_;
  ThreadPool& pool_;
  const std::size_t rows_, cols_;                  // V, H
  HugeArray<std::int8_t> values_;                  // V x H
  std::vector<RowBound> row_bounds_;               // V
  float largest_norm_ = 0;                         // of a row
  AlignedVector<std::int16_t> states_;             // m x H
  AlignedVector<std::int8_t> planes_;              // m x 2 x H: high, low
  std::vector<simd::WholeState> whole_;            // of the covered states
  std::vector<std::size_t> covered_;               // which they are
  std::vector<std::optional<StateBound>> bounds_;  // m
};

}  // namespace infemeral
