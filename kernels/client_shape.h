// The sizes that the weights, the buffers and the kernels of one client share.
#pragma once

#include <cstddef>

#include "absl/status/statusor.h"
#include "engine/client_folder.h"
#include "kernels/layout.h"
#include "kernels/stage.h"

namespace infemeral::cuda {

inline constexpr int kEmbedRows = 256;  // rows of a prompt in one product

struct ClientShape {
  int hidden_size = 0;  // H
  int vocab_size = 0;   // V
  int stride = 0;       // padded(H): elements from one row to the next
  int seen_words = 0;   // words of a bit for each token

  std::size_t hidden() const { return static_cast<std::size_t>(hidden_size); }
  std::size_t vocab() const { return static_cast<std::size_t>(vocab_size); }
};

inline constexpr ClientShape client_shape(int hidden_size, int vocab_size) {
  return {hidden_size, vocab_size, padded(hidden_size), (vocab_size + 31) / 32};
}

// That of the folder's model. InvalidArgument for one that the kernels do not take on this device.
absl::StatusOr<ClientShape> shape_of(const ClientManifest& manifest, const Stage& stage);

}  // namespace infemeral::cuda
