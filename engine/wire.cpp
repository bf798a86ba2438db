#include "engine/wire.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "engine/float16.h"
#include "engine/wire_avx2.h"
#include "engine/wire_edges.h"

namespace infemeral {
namespace {

static_assert(std::endian::native == std::endian::little, "the wire format is little-endian");

constexpr float kMaxF16 = 65504.0f;

std::uint16_t f16_clamped(float value) {
  return f32_to_f16(std::isnan(value) ? value : std::clamp(value, -kMaxF16, kMaxF16));
}

std::size_t i8_blocks(std::size_t cols) {
  return (cols + kI8Block - 1) / kI8Block;
}

void encode_f16(std::span<const float> row, std::byte* out) {
  std::size_t j = wire_avx2_available() ? encode_f16_avx2(row.data(), row.size(), out) : 0;
  for (; j < row.size(); ++j) {
    const std::uint16_t half = f16_clamped(row[j]);
    std::memcpy(out + 2 * j, &half, 2);
  }
}

void decode_f16(const std::byte* in, std::span<float> row) {
  std::size_t j = wire_avx2_available() ? decode_f16_avx2(in, row.size(), row.data()) : 0;
  for (; j < row.size(); ++j) {
    std::uint16_t half;
    std::memcpy(&half, in + 2 * j, 2);
    row[j] = f16_to_f32(half);
  }
}

float max_magnitude(std::span<const float> block) {
  if (block.size() == kI8Block && wire_avx2_available()) return max_magnitude_avx2(block.data());
  float max = 0;
  for (float x : block) max = std::max(max, std::fabs(x));
  return max;
}

// The scale of a block, which its reader has: the step is cut from it, so that the error stays
// below half a step.
struct I8Scale {
  std::uint16_t half;
  float inverse;
  explicit I8Scale(float largest) : half(f16_clamped(largest / 127.0f)) {
    const float scale = f16_to_f32(half);
    inverse = scale > 0 ? 1.0f / scale : 0.0f;
  }
};

void quantize(std::span<const float> block, float inverse, std::byte* out) {
  if (block.size() == kI8Block && wire_avx2_available()) {
    quantize_block_avx2(block.data(), inverse, out);
    return;
  }
  for (std::size_t j = 0; j < block.size(); ++j) {
    const float scaled = std::clamp(block[j] * inverse, -127.0f, 127.0f);
    out[j] = static_cast<std::byte>(
        static_cast<std::int8_t>(std::isnan(scaled) ? 0 : std::lrintf(scaled)));
  }
}

void encode_i8(std::span<const float> row, std::byte* out) {
  std::byte* values = out + 2 * i8_blocks(row.size());
  for (std::size_t begin = 0; begin < row.size(); begin += kI8Block) {
    const auto block = row.subspan(begin, std::min(kI8Block, row.size() - begin));
    const I8Scale scale(max_magnitude(block));
    std::memcpy(out + 2 * (begin / kI8Block), &scale.half, 2);
    quantize(block, scale.inverse, values + begin);
  }
}

void decode_i8(const std::byte* in, std::span<float> row) {
  const std::byte* values = in + 2 * i8_blocks(row.size());
  for (std::size_t begin = 0; begin < row.size(); begin += kI8Block) {
    std::uint16_t half_scale;
    std::memcpy(&half_scale, in + 2 * (begin / kI8Block), 2);
    const float scale = f16_to_f32(half_scale);
    const std::size_t end = std::min(begin + kI8Block, row.size());
    for (std::size_t j = begin; j < end; ++j) {
      row[j] = scale * static_cast<float>(static_cast<std::int8_t>(values[j]));
    }
  }
}

template <typename Test>
void append_if(std::size_t begin, std::size_t end, std::vector<std::uint32_t>& columns,
               const Test& test) {
  constexpr std::size_t kGroup = 16;  // most have none, which is found out in straight code
  for (; begin < end; begin += kGroup) {
    const std::size_t group_end = std::min(begin + kGroup, end);
    int n = 0;
    if (group_end - begin == kGroup) {
      for (std::size_t i = 0; i < kGroup; ++i) n += test(begin + i);
      if (n == 0) continue;
    }
    for (std::size_t j = begin; j < group_end; ++j) {
      if (test(j)) columns.push_back(static_cast<std::uint32_t>(j));
    }
  }
}

}  // namespace

std::string_view wire_dtype_name(WireDtype dtype) {
  switch (dtype) {
    case WireDtype::kF32:
      return "f32";
    case WireDtype::kF16:
      return "f16";
    case WireDtype::kI8:
      return "i8";
  }
  return "invalid";
}

std::optional<WireDtype> parse_wire_dtype(std::string_view name) {
  for (WireDtype dtype : {WireDtype::kF32, WireDtype::kF16, WireDtype::kI8}) {
    if (name == wire_dtype_name(dtype)) return dtype;
  }
  return std::nullopt;
}

std::optional<WireDtype> wire_dtype_from_number(std::uint32_t number) {
  if (number < 1 || number > 3) return std::nullopt;
  return static_cast<WireDtype>(number);
}

std::size_t wire_row_bytes(WireDtype dtype, std::size_t cols) {
  switch (dtype) {
    case WireDtype::kF32:
      return 4 * cols;
    case WireDtype::kF16:
      return 2 * cols;
    case WireDtype::kI8:
      return 2 * i8_blocks(cols) + cols;
  }
  return 0;
}

void encode_wire_row(WireDtype dtype, std::span<const float> row, std::byte* out) {
  switch (dtype) {
    case WireDtype::kF32:
      std::memcpy(out, row.data(), row.size_bytes());
      return;
    case WireDtype::kF16:
      encode_f16(row, out);
      return;
    case WireDtype::kI8:
      encode_i8(row, out);
      return;
  }
}

void append_scale_edges(std::span<const float> row, float error,
                        std::vector<std::uint32_t>& columns) {
  for (std::size_t begin = 0; begin < row.size(); begin += kI8Block) {
    const std::size_t end = std::min(begin + kI8Block, row.size());
    const float largest = max_magnitude(row.subspan(begin, end - begin));
    if (!near_scale_edge(largest, error)) continue;
    append_if(begin, end, columns,
              [&](std::size_t j) { return can_be_largest(row[j], largest, error); });
  }
}

void append_code_edges(WireDtype dtype, std::span<const float> row, float error,
                       std::vector<std::uint32_t>& columns) {
  switch (dtype) {
    case WireDtype::kF32:
      return;
    case WireDtype::kF16:
      append_if(0, row.size(), columns,
                [&](std::size_t j) { return near_f16_edge(row[j], error); });
      return;
    case WireDtype::kI8:
      for (std::size_t begin = 0; begin < row.size(); begin += kI8Block) {
        const std::size_t end = std::min(begin + kI8Block, row.size());
        const I8Scale scale(max_magnitude(row.subspan(begin, end - begin)));
        append_if(begin, end, columns,
                  [&](std::size_t j) { return near_i8_edge(row[j], scale.inverse, error); });
      }
      return;
  }
}

void decode_wire_row(WireDtype dtype, const std::byte* in, std::span<float> row) {
  switch (dtype) {
    case WireDtype::kF32:
      std::memcpy(row.data(), in, row.size_bytes());
      return;
    case WireDtype::kF16:
      decode_f16(in, row);
      return;
    case WireDtype::kI8:
      decode_i8(in, row);
      return;
  }
}

}  // namespace infemeral
