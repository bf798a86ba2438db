#include "kernels/call_buffers.h"

namespace infemeral::cuda {

absl::StatusOr<CallBuffers> make_call_buffers(const ClientShape& shape, bool certified,
                                              DeviceUsage& usage) {
  const std::size_t s = shape.stride, k = kMaxRows, scores = score_stride(shape.vocab());
  CallBuffers b;
  const auto on_device = [&](auto& array, std::size_t size) {
    return allocate(array, Place::kDevice, size, usage);
  };
  INFEMERAL_RETURN(on_device(b.cloaked, k * s));
  INFEMERAL_RETURN(on_device(b.states, k * s));
  INFEMERAL_RETURN(on_device(b.residual, k * s));
  INFEMERAL_RETURN(on_device(b.embedded, kEmbedRows * s));
  INFEMERAL_RETURN(on_device(b.units, k));
  INFEMERAL_RETURN(on_device(b.upper, k * scores));
  INFEMERAL_RETURN(on_device(b.lower, certified ? k * scores : 0));
  INFEMERAL_RETURN(on_device(b.split, plane_bytes(kMaxRows, 2 * s)));
  INFEMERAL_RETURN(on_device(b.planes, plane_bytes(kMaxRows, s)));
  INFEMERAL_RETURN(on_device(b.half_rows, kEmbedRows * s));
  INFEMERAL_RETURN(on_device(b.rows, k));
  INFEMERAL_RETURN(on_device(b.candidates, k * kMaxCandidates));
  INFEMERAL_RETURN(on_device(b.tokens, k));
  INFEMERAL_RETURN(on_device(b.seen, k * shape.seen_words));
  INFEMERAL_RETURN(on_device(b.encoded_blocks, 1));
  return b;
}

}  // namespace infemeral::cuda
