#include "cpu/kv_cache.h"

#include <sodium.h>
#include <sys/mman.h>

#include <cstring>
#include <new>

#include "engine/text.h"

namespace infemeral {

void KvCache::WipeAndUnmap::operator()(std::byte* page) const {
  sodium_memzero(page, bytes);
  munmap(page, bytes);
}

KvCache::Page KvCache::map_page(std::size_t bytes) {
  void* page = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (page == MAP_FAILED) throw std::bad_alloc();
  return Page(static_cast<std::byte*>(page), {bytes});
}

absl::Status KvCache::resize(std::uint32_t keep, std::uint32_t length) {
  const std::size_t pages = (std::size_t{length} + kPagePositions - 1) / kPagePositions;
  try {
    pages_.reserve(pages);
    while (pages_.size() < pages) pages_.push_back(map_page(page_bytes()));
  } catch (const std::bad_alloc&) {
    length_ = keep < length_ ? keep : length_;
    return absl::ResourceExhaustedError(cat("no memory for a KV cache of ", length, " positions (",
                                            pages * page_bytes() >> 20,
                                            " MiB); use a shorter context or fewer sessions"));
  }
  length_ = length;
  return absl::OkStatus();
}

void KvCache::store(const simd::Kernels& kernels, std::size_t layer, std::size_t position,
                    const float* key, const float* value) {
  const std::size_t page = position / kPagePositions, row = position % kPagePositions;
  const std::size_t row_bytes = shape_.head_dim * shape_.element_bytes();
  const auto put = [&](const float* from, std::byte* to) {
    if (shape_.format == simd::Format::kF32) {
      std::memcpy(to, from, row_bytes);
    } else {
      kernels.to_f16(from, shape_.head_dim, reinterpret_cast<std::uint16_t*>(to));
    }
  };
  for (std::size_t head = 0; head < shape_.heads; ++head) {
    put(key + head * shape_.head_dim, keys(page, layer, head) + row * row_bytes);
    put(value + head * shape_.head_dim, values(page, layer, head) + row * row_bytes);
  }
}

}  // namespace infemeral
