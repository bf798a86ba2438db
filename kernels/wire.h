// Hidden states in and out: engine/wire.h's formats on the device, and the embedding table.
#pragma once

#include <cuda_fp16.h>

#include <cstddef>
#include <cstdint>

#include "engine/wire.h"
#include "kernels/head_types.h"
#include "kernels/rotate.h"
#include "kernels/stage.h"

namespace infemeral::cuda {

// Rows that came back from the body, from mapped host memory. Begins a token: copies the requests
// and clears the rest of the row's state.
struct Decode {
  const std::byte* wire = nullptr;       // mapped; states rows
  const RowRequest* requests = nullptr;  // mapped
  const std::uint32_t* seen = nullptr;   // mapped; states x seen_words, for the repetition penalty
  std::uint32_t* seen_copy = nullptr;    // the same on the device
  int seen_words = 0;
  WireDtype dtype = WireDtype::kF16;
  int states = 0;
  int hidden_size = 0;
  int stride = 0;
  float* out = nullptr;  // states x stride
  Split split;           // the same as planes
  RowState* rows = nullptr;
};
cudaError_t decode(const Stage& stage, const Decode& args);

// Rows of the embedding table, as they are and as planes; up to kMaxRows. Ids beyond the table read
// row 0.
struct Embed {
  const std::int32_t* ids = nullptr;  // device or mapped
  int rows = 0;
  const __half* table = nullptr;  // vocab_size x stride
  int vocab_size = 0;
  int stride = 0;
  __half* out = nullptr;  // rows x stride
  Split split;
  unsigned long long* times = nullptr;  // two, mapped: when the lookup began and ended
};
cudaError_t embed(const Stage& stage, const Embed& args);

// rows[i] += level * rms * Gaussians of cuRAND's Philox; engine/cloak_noise.h.
struct AddNoise {
  float* rows = nullptr;  // n x stride
  int n = 0;
  int hidden_size = 0;
  int stride = 0;
  float level = 0;
  std::uint64_t key = 0;
  const std::uint32_t* sequence = nullptr;  // device or mapped: never the same twice
};
cudaError_t add_noise(const Stage& stage, const AddNoise& args);

// Rows on their way to the body, into mapped host memory. With `matrix`, the rows are `plain` times
// it, and their bytes those of engine/wire_edges.h.
struct Encode {
  const float* in = nullptr;       // rows x stride
  const __half* plain = nullptr;   // rows x stride: in[s][i] = matrix[i] . plain[s]
  const __half* matrix = nullptr;  // packed (kernels/rotate.h); nullptr: `in` is taken as it is
  float sum_error = 0;             // of |plain[s]|: how far in[s][i] is from that, at most
  int rows = 0;
  int hidden_size = 0;
  int stride = 0;
  WireDtype dtype = WireDtype::kF16;
  std::byte* wire = nullptr;                // mapped
  std::uint32_t* done = nullptr;            // mapped; receives *sequence behind the last byte
  const std::uint32_t* sequence = nullptr;  // device or mapped
  std::uint32_t* finished = nullptr;        // device: blocks that are done; 0 between calls
};
cudaError_t encode(const Stage& stage, const Encode& args);

}  // namespace infemeral::cuda
