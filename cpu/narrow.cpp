#include "cpu/narrow.h"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>

#include "cpu/simd/dispatch.h"
#include "engine/float16.h"

namespace infemeral {
namespace {

const simd::Kernels& kernels() {
  static const auto chosen = simd::choose_kernels();
  return chosen.ok() ? **chosen : *simd::available_kernels().back();
}

// In the bits of magnitudes, which are ordered as the numbers are, with NaN above them all.
bool fits_f16(std::span<const float> values) {
  constexpr float kOverflow = 65520;  // the first that rounds to infinity
  std::int32_t largest = 0;
  for (const float value : values) {
    largest = std::max(largest, std::bit_cast<std::int32_t>(value) & 0x7fffffff);
  }
  return largest < std::bit_cast<std::int32_t>(kOverflow);
}

bool holds_f16(const std::byte* data) {
  return reinterpret_cast<std::uintptr_t>(data) % alignof(std::uint16_t) == 0;
}

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

void widen(const TensorView& tensor, std::size_t begin, std::span<float> out) {
  if (tensor.dtype != Dtype::kF16 || !holds_f16(tensor.data.data())) {
    return tensor.read(begin, out);
  }
  const auto* values = reinterpret_cast<const std::uint16_t*>(tensor.data.data());
  kernels().from_f16(values + begin, out.size(), out.data());
}

NarrowFaults narrow(std::span<const double> values, Dtype dtype, std::byte* out) {
  return narrow_values(values, dtype, out);
}
NarrowFaults narrow(std::span<const float> values, Dtype dtype, std::byte* out) {
  if (dtype == Dtype::kF16 && holds_f16(out) && fits_f16(values)) {
    kernels().to_f16(values.data(), values.size(), reinterpret_cast<std::uint16_t*>(out));
    return {};
  }
  return narrow_values(values, dtype, out);
}

}  // namespace infemeral
