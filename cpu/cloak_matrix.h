// The cloak's matrix as the CPU multiplies with it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cpu/huge_pages.h"
#include "cpu/linear.h"
#include "engine/cloak.h"

namespace infemeral {

// Q and Q^T, both row-major in float16: twice the memory (67 MB at H = 4096), for which x * Q and
// y * Q^T are one kernel and both read memory in order. Wiped when destroyed.
class CloakMatrix {
 public:
  explicit CloakMatrix(const Cloak& cloak)
      : hidden_size_(cloak.hidden_size()), values_(2 * cloak.values().size()) {
    const std::size_t h = hidden_size_;
    const std::uint16_t* q = cloak.values().data();
    std::uint16_t* transposed = std::copy_n(q, h * h, values_.data());
    // In squares that fit the first-level cache, on both sides.
    constexpr std::size_t kBlock = 64;
    for (std::size_t i0 = 0; i0 < h; i0 += kBlock) {
      for (std::size_t j0 = 0; j0 < h; j0 += kBlock) {
        for (std::size_t j = j0; j < h && j < j0 + kBlock; ++j) {
          for (std::size_t i = i0; i < h && i < i0 + kBlock; ++i) {
            transposed[j * h + i] = q[i * h + j];
          }
        }
      }
    }
  }
  ~CloakMatrix() { values_.wipe(); }
  CloakMatrix(const CloakMatrix&) = delete;
  CloakMatrix& operator=(const CloakMatrix&) = delete;

  Matrix rows() const { return view(values_.data()); }  // y * rows^T = y * Q^T
  // x * transposed^T = x * Q
  Matrix transposed() const { return view(values_.data() + hidden_size_ * hidden_size_); }
  std::size_t bytes() const { return values_.bytes(); }

 private:
  Matrix view(const std::uint16_t* data) const {
    return {.format = simd::Format::kF16,
            .data = reinterpret_cast<const std::byte*>(data),
            .rows = hidden_size_,
            .cols = hidden_size_};
  }

  std::size_t hidden_size_;
  HugeArray<std::uint16_t> values_;  // Q, then Q^T
};

}  // namespace infemeral
