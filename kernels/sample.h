// Choosing tokens on the device, without sorting the vocabulary: engine/sampling.h and the
// candidate policy of engine/certified_head.h. After the int8 product: scan, where a row asks for
// top-k, and select. After a full one: score_logits, then the same with `known`.
#pragma once

#include <cuda_fp16.h>

#include "kernels/head_types.h"
#include "kernels/layout.h"
#include "kernels/stage.h"

namespace infemeral::cuda {

struct Sample {
  int n = 0;  // rows
  int vocab_size = 0;
  int stride = 0;
  RowState* rows = nullptr;
  const float* lower = nullptr;     // n x score_stride(V)
  float* upper = nullptr;           // the same; of a full product: logits
  const __half* lm_head = nullptr;  // V x stride; device memory or mapped host memory
  const float* states = nullptr;    // n x stride
  const std::uint32_t* seen = nullptr;
  int seen_words = 0;
  Candidate* candidates = nullptr;  // n x kMaxCandidates
  RowResult* results = nullptr;     // mapped
  std::int32_t* tokens = nullptr;   // n, on the device: for the next embedding
  bool known = false;               // lower and upper are one array, of scores: nothing is rescored
  bool need_proof = false;          // choose_full: a state that is not covered is uncertain
};

// Counts where intervals begin, which top-k must know before it can tell candidates. Rows with
// other requests may do without.
cudaError_t scan(const Stage& stage, const Sample& args);
// Collects the candidates, rescores them in float16 with the full head's dot product, and takes the
// best, or with `chooses` what filters and draw say, which rows that are not greedy need. The
// result goes to the host.
cudaError_t select(const Stage& stage, const Sample& args, bool chooses);
// Logits in `upper` become scores, and their largest is told, for rows that no product has left its
// ends in. Rows with scores that are not finite are uncertain.
cudaError_t score_logits(const Stage& stage, const Sample& args);
// Makes the row ready for score_logits.
cudaError_t forget_candidates(const Stage& stage, RowState* row);
// Filters and draw with every token as a candidate, by one block a row: what the others find
// uncertain. `upper` holds the logits, which become scores, or with `known` those already.
cudaError_t choose_full(const Stage& stage, const Sample& args);

}  // namespace infemeral::cuda
