// What the kernels of one call hand on to each other; on the device, for up to kMaxRows rows (a
// prompt's: kEmbedRows). Graphs are recorded with these addresses, so nothing here moves or grows.
#pragma once

#include <cuda_fp16.h>

#include <cstddef>
#include <cstdint>

#include "absl/status/statusor.h"
#include "kernels/client_shape.h"
#include "kernels/device.h"
#include "kernels/head_types.h"
#include "kernels/rotate.h"

namespace infemeral::cuda {

struct CallBuffers {
  // embed, cloak
  Array<__half> half_rows;              // kEmbedRows x stride: embedded rows
  Array<float> embedded;                // kEmbedRows x stride: cloaked rows on their way out
  Array<std::uint32_t> encoded_blocks;  // 1: kernels/wire.h's counter of blocks that are done

  // decode, uncloak
  Array<float> cloaked;       // kMaxRows x stride: rows that came back
  Array<std::byte> split;     // plane_bytes(kMaxRows, 2 * stride): rows as float16 planes
  Array<float> units;         // kMaxRows: of the planes
  Array<float> residual;      // kMaxRows x stride: of the refinement
  Array<float> states;        // kMaxRows x stride: what lm_head is multiplied with
  Array<RowState> rows;       // kMaxRows
  Array<std::uint32_t> seen;  // kMaxRows x seen_words: the mailbox's, copied by decode

  // de_embed, sample
  Array<std::byte> planes;      // plane_bytes(kMaxRows, stride): states as int8 planes
  Array<float> lower, upper;    // kMaxRows x score_stride(V); lower: empty unless certified
  Array<Candidate> candidates;  // kMaxRows x kMaxCandidates
  Array<std::int32_t> tokens;   // kMaxRows: what was chosen, for the next embedding

  Split planes_of_rows() const { return {split.data(), units.data()}; }
};

// certified: for the certified head. ResourceExhausted when memory is out.
absl::StatusOr<CallBuffers> make_call_buffers(const ClientShape& shape, bool certified,
                                              DeviceUsage& usage);

}  // namespace infemeral::cuda
