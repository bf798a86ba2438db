#include "cpu/narrow.h"

#include <cstdint>
#include <cstring>

#include "engine/float16.h"

namespace infemeral {
namespace {

template <typename T>
NarrowFaults narrow_values(std::span<const T> values, Dtype dtype, std::byte* out) {
  NarrowFaults faults;
  for (const T value : values) {
    const auto single = static_cast<float>(value);
    float stored = single;
    if (dtype == Dtype::kF32) {
      std::memcpy(out, &single, sizeof single);
    } else {
      const std::uint16_t half = dtype == Dtype::kF16 ? f32_to_f16(single) : f32_to_bf16(single);
      stored = dtype == Dtype::kF16 ? f16_to_f32(half) : bf16_to_f32(half);
      std::memcpy(out, &half, sizeof half);
    }
    if (!std::isfinite(stored)) faults.add(value);
    out += dtype_bytes(dtype);
  }
  return faults;
}

}  // namespace

NarrowFaults narrow(std::span<const double> values, Dtype dtype, std::byte* out) {
  return narrow_values(values, dtype, out);
}
NarrowFaults narrow(std::span<const float> values, Dtype dtype, std::byte* out) {
  return narrow_values(values, dtype, out);
}

}  // namespace infemeral
