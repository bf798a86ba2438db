// The subset head on the device (engine/subset_head.h): its rows of lm_head in a table of their
// own. The logits come to the host, which is sure of a token or not.
#pragma once

#include <cuda_fp16.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/client_folder.h"
#include "engine/subset_head.h"
#include "kernels/client_shape.h"
#include "kernels/device.h"
#include "kernels/full_head.h"

namespace infemeral::cuda {

class SubsetHead {
 public:
  // ids: as load_token_subset gives them. The rows are copied from the folder.
  static absl::StatusOr<SubsetHead> load(const Device& device, const ClientFolder& folder,
                                         const ClientShape& shape, std::vector<std::int32_t> ids,
                                         DeviceUsage& usage);

  // Puts on the stage's stream what `product` says of the whole lm_head, for the subset's rows: the
  // same bits. The functions below may be called when the stream has come so far.
  absl::Status de_embed(const Stage& stage, FullHead product) const;

  // A token for state i of the product, if the subset is sure of it. Overwrites the state's logits.
  std::optional<std::int32_t> sample(int i, const SampleRequest& request);
  // Minus infinity outside the subset where a plain greedy request for state 0 would be accepted.
  void restrict_logits(std::span<float> logits) const;

  std::size_t bytes() const { return rows_.bytes(); }

 private:
  SubsetHead(std::vector<std::int32_t> ids, std::size_t vocab_size)
      : sampler_(std::move(ids), vocab_size) {}
  std::size_t size() const { return sampler_.ids().size(); }

  SubsetSampler sampler_;
  Array<__half> rows_;   // n x stride
  Array<float> logits_;  // pinned, kMaxRows x score_stride(n)
};

}  // namespace infemeral::cuda
