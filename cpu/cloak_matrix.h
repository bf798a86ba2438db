// The cloak's matrix as the CPU multiplies with it.
#pragma once

#include <sodium.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "cpu/huge_pages.h"
#include "cpu/linear.h"
#include "engine/cloak.h"

namespace infemeral {

// Q and Q^T, both row-major in float16: twice the memory (67 MB at H = 4096), for which x * Q and
// y * Q^T are one kernel and both read memory in order. Wiped when destroyed.
class CloakMatrix {
 public:
  explicit CloakMatrix(Cloak cloak)
      : cloak_(std::move(cloak)), transposed_(cloak_.values().size()) {
    // In squares that fit the first-level cache, on both sides.
    constexpr std::size_t kBlock = 64;
    const std::size_t h = cloak_.hidden_size();
    const std::uint16_t* q = cloak_.values().data();
    for (std::size_t i0 = 0; i0 < h; i0 += kBlock) {
      for (std::size_t j0 = 0; j0 < h; j0 += kBlock) {
        for (std::size_t j = j0; j < h && j < j0 + kBlock; ++j) {
          for (std::size_t i = i0; i < h && i < i0 + kBlock; ++i) {
            transposed_[j * h + i] = q[i * h + j];
          }
        }
      }
    }
    // Half as long again from pages of 4 KB.
    move_to_huge_pages(cloak_.values().data(), cloak_.values().size_bytes());
    move_to_huge_pages(transposed_.data(), transposed_.size() * sizeof(std::uint16_t));
  }
  ~CloakMatrix() { sodium_memzero(transposed_.data(), transposed_.size() * sizeof(std::uint16_t)); }
  CloakMatrix(const CloakMatrix&) = delete;
  CloakMatrix& operator=(const CloakMatrix&) = delete;

  Matrix rows() const { return view(cloak_.values().data()); }    // y * rows^T = y * Q^T
  Matrix transposed() const { return view(transposed_.data()); }  // x * transposed^T = x * Q
  std::size_t bytes() const { return 2 * transposed_.size() * sizeof(std::uint16_t); }

 private:
  Matrix view(const std::uint16_t* data) const {
    return {.format = simd::Format::kF16,
            .data = reinterpret_cast<const std::byte*>(data),
            .rows = cloak_.hidden_size(),
            .cols = cloak_.hidden_size()};
  }

  Cloak cloak_;
  std::vector<std::uint16_t> transposed_;
};

}  // namespace infemeral
