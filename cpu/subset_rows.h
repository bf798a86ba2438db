// Some rows of a matrix, copied side by side, so that their product streams through memory like
// that of the whole matrix.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include "cpu/huge_pages.h"
#include "cpu/linear.h"

namespace infemeral {

// Row i is row ids[i] of the matrix that it was made from.
class SubsetRows {
 public:
  SubsetRows(const Matrix& all, std::span<const std::int32_t> ids)
      : values_(ids.size() * all.row_bytes()),
        matrix_{all.format, values_.data(), ids.size(), all.cols} {
    auto* out = values_.data();
    for (std::int32_t id : ids) {
      out = std::copy_n(all.row(static_cast<std::size_t>(id)).data, all.row_bytes(), out);
    }
  }
  SubsetRows(const SubsetRows&) = delete;  // matrix_ points into values_
  SubsetRows& operator=(const SubsetRows&) = delete;

  // Overwrites the copy, for rows that are secret.
  void wipe() { values_.wipe(); }

  const Matrix& matrix() const { return matrix_; }
  std::size_t bytes() const { return values_.bytes(); }

 private:
  HugeArray<std::byte> values_;
  const Matrix matrix_;
};

}  // namespace infemeral
