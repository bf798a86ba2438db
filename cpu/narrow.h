// From the numbers of products to the dtypes of files, with an eye on what they cannot hold.
#pragma once

#include <cmath>
#include <cstddef>
#include <span>

#include "engine/safetensors.h"

namespace infemeral {

// What a conversion could not represent: infinities and NaN, and what became infinite.
struct NarrowFaults {
  std::size_t count = 0;
  double largest = 0;  // the largest magnitude among them; NaN when one was NaN

  void add(double value) {
    ++count;
    note(std::fabs(value));
  }
  void add(const NarrowFaults& other) {
    count += other.count;
    note(other.largest);
  }

 private:
  void note(double magnitude) {  // a NaN stays
    if (std::isnan(magnitude) || magnitude > largest) largest = magnitude;
  }
};

// Elements [begin, begin + out.size()) of a tensor converted to float32, as TensorView::read does
// it, by the machine's own instructions where it has them.
void widen(const TensorView& tensor, std::size_t begin, std::span<float> out);

// Writes values as `dtype` (kF32, kF16 or kBF16) to out, which holds values.size() elements at any
// alignment. Rounds to float32 first; values too small become subnormal or zero.
NarrowFaults narrow(std::span<const double> values, Dtype dtype, std::byte* out);
NarrowFaults narrow(std::span<const float> values, Dtype dtype, std::byte* out);

}  // namespace infemeral
