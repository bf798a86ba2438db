#include "kernels/subset_head.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#include "kernels/upload.h"

namespace infemeral::cuda {

absl::StatusOr<SubsetHead> SubsetHead::load(const Device& device, const ClientFolder& folder,
                                            const ClientShape& shape, std::vector<std::int32_t> ids,
                                            DeviceUsage& usage) {
  const std::size_t n = ids.size(), row_bytes = shape.hidden() * sizeof(__half);
  std::vector<std::byte> rows(n * row_bytes);
  for (std::size_t i = 0; i < n; ++i) {
    std::memcpy(&rows[i * row_bytes],
                folder.lm_head.data.data() + static_cast<std::size_t>(ids[i]) * row_bytes,
                row_bytes);
  }
  SubsetHead head(std::move(ids), shape.vocab());
  INFEMERAL_RETURN(allocate(head.rows_, Place::kDevice, n * shape.stride, usage));
  INFEMERAL_RETURN(allocate(head.logits_, Place::kPinned, kMaxRows * score_stride(n), usage));
  INFEMERAL_RETURN(upload_rows(device, rows, n, shape.hidden(), shape.stride, Place::kDevice,
                               head.rows_.data(), usage));
  return head;
}

absl::Status SubsetHead::de_embed(const Stage& stage, FullHead product) const {
  product.lm_head = rows_.data();
  product.vocab_size = static_cast<int>(size());
  product.logits = logits_.data();
  INFEMERAL_CUDA(full_head(stage, product));
  return absl::OkStatus();
}

std::optional<std::int32_t> SubsetHead::sample(int i, const SampleRequest& request) {
  return sampler_.sample({&logits_[i * score_stride(size())], size()}, request);
}

void SubsetHead::restrict_logits(std::span<float> logits) const {
  const std::span<const float> inside(logits_.data(), size());
  if (subset_confidence(inside, {}) < kSubsetConfidence) return;
  std::fill(logits.begin(), logits.end(), -std::numeric_limits<float>::infinity());
  for (std::size_t i = 0; i < inside.size(); ++i) {
    logits[static_cast<std::size_t>(sampler_.ids()[i])] = inside[i];
  }
}

}  // namespace infemeral::cuda
