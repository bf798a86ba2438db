// The keys and values of one conversation.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "cpu/simd/kernels.h"
#include "engine/body.h"

namespace infemeral {

// Positions that one page holds.
inline constexpr std::size_t kPagePositions = 256;

struct KvShape {
  std::size_t layers = 0;
  std::size_t heads = 0;  // of keys and values
  std::size_t head_dim = 0;
  simd::Format format = simd::Format::kF16;  // kF32 or kF16

  std::size_t element_bytes() const { return format == simd::Format::kF32 ? 4 : 2; }
  // Over all layers.
  std::size_t bytes_per_position() const { return layers * 2 * heads * head_dim * element_bytes(); }
};

// Pages of [layer][key, value][head][position][head_dim], added as the conversation grows; the
// positions of one head lie together, as attention reads them. All memory is wiped before it is
// given back.
class KvCache final : public BodySession {
 public:
  // `owner` tells the sessions of one body from those of another.
  KvCache(const KvShape& shape, const void* owner) : shape_(shape), owner_(owner) {}
  KvCache(const KvCache&) = delete;
  KvCache& operator=(const KvCache&) = delete;

  std::uint32_t kv_len() const override { return length_; }
  std::size_t kv_bytes() const override { return pages_.size() * page_bytes(); }
  const void* owner() const { return owner_; }
  simd::Format format() const { return shape_.format; }

  // Makes room for positions [0, length) and forgets what lies at or beyond `keep`.
  // ResourceExhausted when there is no memory for it.
  absl::Status resize(std::uint32_t keep, std::uint32_t length);

  // One head's keys (or values) of a page: kPagePositions rows of head_dim.
  std::byte* keys(std::size_t page, std::size_t layer, std::size_t head) const {
    return block(page, layer, 0, head);
  }
  std::byte* values(std::size_t page, std::size_t layer, std::size_t head) const {
    return block(page, layer, 1, head);
  }

  // Writes one position: `key` and `value` hold all heads.
  void store(const simd::Kernels& kernels, std::size_t layer, std::size_t position,
             const float* key, const float* value);

 private:
  std::size_t page_bytes() const { return kPagePositions * shape_.bytes_per_position(); }
  std::byte* block(std::size_t page, std::size_t layer, std::size_t which, std::size_t head) const {
    const std::size_t index = (layer * 2 + which) * shape_.heads + head;
    return pages_[page].get() + index * kPagePositions * shape_.head_dim * shape_.element_bytes();
  }

  // A page is a mapping of its own: what a session held goes back to the system when it ends, and
  // not to a heap that keeps it.
  struct WipeAndUnmap {
    std::size_t bytes = 0;
    void operator()(std::byte* page) const;
  };
  using Page = std::unique_ptr<std::byte[], WipeAndUnmap>;
  static Page map_page(std::size_t bytes);  // throws std::bad_alloc

  KvShape shape_;
  const void* owner_;
  std::vector<Page> pages_;
  std::uint32_t length_ = 0;
};

}  // namespace infemeral
