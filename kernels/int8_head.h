// The int8 copy of lm_head on the device: rounding rows and states, and the product with the
// intervals that it proves (engine/certified_head.h).
//
// The copy lies in the order in which it is read. Columns are cut into chunks of 256; the last may
// be narrower. First the first chunk of every tile of 16 rows, then the second of every tile, ...,
// so that what all multiprocessors fetch at one time lies together. A tile of a chunk is four
// blocks of 64 columns; a block is 1 KB: rows 0-7, then rows 8-15, each as the 32 lanes of
// kernels/layout.h. Tiles are fetched several at a time, as one piece.
#pragma once

#include <cuda_fp16.h>

#include <cstddef>
#include <cstdint>

#include "kernels/head_types.h"
#include "kernels/layout.h"
#include "kernels/stage.h"

namespace infemeral::cuda {

// Rounds rows [first, first + count) of lm_head, which lie at `rows`; the last call of a matrix
// also fills the rows that its last group lacks.
struct QuantiseRows {
  const __half* rows = nullptr;  // count x stride
  int vocab_size = 0;
  int first = 0;  // a multiple of kGroupRows
  int count = 0;
  int hidden_size = 0;
  int stride = 0;
  std::byte* copy = nullptr;      // int8_rows(V) x stride
  RowBound* bounds = nullptr;     // int8_rows(V)
  float* largest_norm = nullptr;  // one value, 0 before the first call
};
cudaError_t quantise_rows(const Stage& stage, const QuantiseRows& args);

// States into whole numbers of two bytes, as two planes (kernels/layout.h): high bytes, low bytes;
// their product with the copy; and the intervals that it proves. Scores: ends after repetition
// penalty and temperature. Writes `covered` and `top` of every row's state.
struct Product {
  const float* states = nullptr;  // n x stride
  int n = 0;
  int hidden_size = 0;
  int stride = 0;
  int vocab_size = 0;
  const std::byte* copy = nullptr;
  const RowBound* bounds = nullptr;
  const float* largest_norm = nullptr;
  std::byte* planes = nullptr;          // plane_bytes(n, stride)
  const std::uint32_t* seen = nullptr;  // n x seen_words
  int seen_words = 0;
  RowState* rows = nullptr;
  float* lower = nullptr;    // n x score_stride(V); written where the row's selection reads it
  float* upper = nullptr;    // n x score_stride(V)
  bool approximate = false;  // upper receives the logits that the product stands for instead
};
// Whether warpgroups multiply (kernels/warpgroup.cuh); planes then lie in the order that they need.
inline bool warpgroup_products(const Stage& stage, int n) {
  return stage.warpgroups && column_groups(n) >= 4;
}
// The first step by itself: planes, and bounds and `covered` of the rows' states.
cudaError_t quantise_states(const Stage& stage, const Product& args);
// All of it. InvalidConfiguration for a hidden size of a hundred thousand or so.
cudaError_t int8_head(const Stage& stage, const Product& args);

}  // namespace infemeral::cuda
