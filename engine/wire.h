// The wire format of hidden states: what a row of floats looks like as bytes.
//
//   f32   cols x little-endian binary32
//   f16   cols x little-endian binary16
//   i8    ceil(cols/64) x binary16 scale, then cols x int8; element j = scale[j/64] * q[j].
//         scale = max|x| over the block / 127, rounded to binary16; q = round(x / scale)
//
// Rows follow each other without padding. Compression and encryption come later, in net/: these
// bytes are what a backend writes and reads, on whichever device it computes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

namespace infemeral {

enum class WireDtype : std::uint8_t {
  kF32 = 1,
  kF16 = 2,
  kI8 = 3
};  // on the wire: do not renumber

inline constexpr std::size_t kI8Block = 64;  // elements that share a scale

// "f32", "f16" or "i8".
std::string_view wire_dtype_name(WireDtype dtype);
std::optional<WireDtype> parse_wire_dtype(std::string_view name);
// For a number that came from outside.
std::optional<WireDtype> wire_dtype_from_number(std::uint32_t number);

// Bytes of one row of `cols` elements.
std::size_t wire_row_bytes(WireDtype dtype, std::size_t cols);

// Writes `row` as wire_row_bytes(dtype, row.size()) bytes at `out`. In f16, values beyond +-65504
// are clamped to it (a step must never carry an infinity); in i8 a block's scale is clamped alike.
// NaN is the caller's mistake and stays NaN in f32 and f16, 0 in i8.
void encode_wire_row(WireDtype dtype, std::span<const float> row, std::byte* out);

// Appends, in order, the columns of `row` whose bytes could be others if its values were off by up
// to `error` (engine/wire_edges.h): in i8, first those that scales hang on, and when these are
// exact, the rest. In f32 that would be all of them; it appends none.
void append_scale_edges(std::span<const float> row, float error,
                        std::vector<std::uint32_t>& columns);
void append_code_edges(WireDtype dtype, std::span<const float> row, float error,
                       std::vector<std::uint32_t>& columns);

// The reverse; reads wire_row_bytes(dtype, row.size()) bytes at `in`.
void decode_wire_row(WireDtype dtype, const std::byte* in, std::span<float> row);

}  // namespace infemeral
