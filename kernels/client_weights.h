// The client's weights where the kernels read them: loaded once, never written again.
#pragma once

#include <cuda_fp16.h>

#include <cstddef>

#include "absl/status/statusor.h"
#include "engine/client_folder.h"
#include "kernels/client_shape.h"
#include "kernels/device.h"
#include "kernels/int8_head.h"

namespace infemeral::cuda {

struct ClientWeights {
  Array<__half> lm_head;       // V x stride, on the device or pinned
  Array<__half> embed_tokens;  // the same; empty when the model ties it to lm_head
  Array<float> gain;           // stride: of the final norm

  // The int8 copy of lm_head (kernels/int8_head.h), always on the device; empty where no head reads
  // it.
  Array<std::byte> copy;      // int8_rows(V) x stride
  Array<RowBound> bounds;     // int8_rows(V)
  Array<float> largest_norm;  // 1

  // The table that embed reads, V x stride.
  const __half* embedding_table() const {
    return embed_tokens.size() > 0 ? embed_tokens.data() : lm_head.data();
  }
  std::size_t bytes() const {
    return lm_head.bytes() + embed_tokens.bytes() + gain.bytes() + copy.bytes() + bounds.bytes();
  }
};

struct WeightsOptions {
  Place place = Place::kDevice;  // of the float16 tables
  bool int8_copy = false;
};

// Copies the folder's tables, which need not stay mapped, and rounds the int8 copy on the device;
// everything is there when it returns. ResourceExhausted when memory is out.
absl::StatusOr<ClientWeights> load_weights(const Device& device, const ClientFolder& folder,
                                           const ClientShape& shape, const WeightsOptions& options,
                                           DeviceUsage& usage);

}  // namespace infemeral::cuda
