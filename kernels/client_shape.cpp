#include "kernels/client_shape.h"

#include "engine/text.h"

namespace infemeral::cuda {
namespace {

constexpr std::size_t kMaxVocab = std::size_t{1}
                                  << 21;  // kernels/sample.cu adds up so many weights
// Shared memory of a block that is not for a state in float32.
constexpr std::size_t kReserved = 24 << 10;

}  // namespace

absl::StatusOr<ClientShape> shape_of(const ClientManifest& manifest, const Stage& stage) {
  const std::size_t hidden = manifest.hidden_size, vocab = manifest.vocab_size;
  const bool fits = hidden <= stage.shared_bytes && vocab <= kMaxVocab;  // before they become ints
  if (fits) {
    const ClientShape shape = client_shape(static_cast<int>(hidden), static_cast<int>(vocab));
    if (shape.stride * sizeof(float) + kReserved <= stage.shared_bytes) return shape;
  }
  return absl::InvalidArgumentError(cat("the CUDA backend does not take a model of hidden size ",
                                        hidden, " and ", vocab,
                                        " tokens on this GPU; use --backend cpu"));
}

}  // namespace infemeral::cuda
