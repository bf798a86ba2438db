// Any bytes as a packed tensor, and any tensor packed. What an LZ4 block unpacks to is compared
// with a decoder that reads like the format's description. Bytes are moved and compared in pieces:
// loops over them, instrumented, would take all the time.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "net/codec.h"

namespace {

using namespace infemeral;

void check(bool holds) {
  if (!holds) std::abort();
}

// Nothing for a block that is cut or points before its beginning, or beyond `limit` bytes; an
// offset of 0 is told apart.
std::optional<std::string> decode_block(std::string_view block, std::size_t limit,
                                        bool& zero_offset) {
  std::string out;
  std::size_t at = 0;
  const auto byte = [&]() -> int {
    return at < block.size() ? static_cast<std::uint8_t>(block[at++]) : -1;
  };
  const auto extended = [&](std::size_t length) -> std::optional<std::size_t> {
    if (length < 15) return length;
    while (true) {
      const int more = byte();
      if (more < 0) return std::nullopt;
      length += static_cast<std::size_t>(more);
      if (more < 255) return length;
    }
  };
  while (true) {
    const int token = byte();
    if (token < 0) return std::nullopt;
    const auto literals = extended(static_cast<std::size_t>(token) >> 4);
    if (!literals || *literals > block.size() - at || *literals > limit - out.size()) {
      return std::nullopt;
    }
    out += block.substr(at, *literals);
    at += *literals;
    if (at == block.size()) return out;  // the last sequence has no match
    const int low = byte(), high = byte();
    if (high < 0) return std::nullopt;
    const std::size_t offset = static_cast<std::size_t>(low | high << 8);
    const auto match = extended(static_cast<std::size_t>(token) & 15);
    zero_offset = zero_offset || offset == 0;
    if (!match || offset == 0 || offset > out.size() || *match + 4 > limit - out.size()) {
      return std::nullopt;
    }
    // Where a match overlaps what it writes, that repeats.
    const std::size_t from = out.size() - offset;
    for (std::size_t left = *match + 4; left > 0;) {
      const std::size_t piece = std::min(left, out.size() - from);
      out.append(out, from, piece);
      left -= piece;
    }
  }
}

bool equal(std::string_view a, std::span<const std::byte> b) {
  return a == std::string_view(reinterpret_cast<const char*>(b.data()), b.size());
}

void unpack(const PackedTensor& packed, std::size_t expected) {
  std::vector<std::byte> rows, used(expected, std::byte{0xaa});
  const absl::Status status = unpack_tensor(packed, expected, rows);
  check(unpack_tensor(packed, expected, used) == status);
  if (!status.ok()) {
    check(status.code() == absl::StatusCode::kInvalidArgument);
    return;
  }
  const std::string_view got(reinterpret_cast<const char*>(rows.data()), rows.size());
  check(rows.size() == expected && equal(got, used));
  if (packed.lz4) {
    bool zero_offset = false;
    const auto decoded = decode_block(packed.bytes, expected, zero_offset);
    check(zero_offset || decoded == got);  // the library lets that pass
  } else {
    check(packed.bytes == got);
  }
}

// Rows that repeat the input, with changes in between, so that they compress more or less.
void pack(std::string_view input, std::size_t size, std::uint8_t stir) {
  if (input.empty()) return;
  std::string repeated(input.substr(0, size));
  while (repeated.size() < size) repeated.append(repeated, 0, size - repeated.size());
  for (std::size_t i = stir; stir > 0 && i < size; i += 264 - stir) {
    repeated[i] = static_cast<char>(i * stir >> 4);
  }
  const std::span<const std::byte> rows = std::as_bytes(std::span<const char>(repeated));
  const std::size_t count = 1 + stir / 8 % 2;  // a row alone is not compressed
  PackedTensor packed = pack_tensor(WireDtype::kF16, rows, count);
  check(!packed.lz4 || count > 1);
  check(packed.bytes.size() <= size);
  check(!packed.lz4 || packed.bytes.size() <= size - size / kMinSavingDivisor);
  check(!packed.lz4 || size > kMinCompressBytes);
  std::vector<std::byte> back;
  check(unpack_tensor(packed, size, back).ok() && equal(repeated, back));
  check(!unpack_tensor(packed, size + 1, back).ok());
  if (size > 0) check(!unpack_tensor(packed, size - 1, back).ok());
  if (packed.bytes.empty()) return;
  packed.bytes[input.size() * stir % packed.bytes.size()] ^= static_cast<char>(1 + stir / 2);
  unpack(packed, size);
}

}  // namespace

// A byte that chooses, two of the size that is expected, and the block.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size < 3) return 0;
  const std::size_t expected = static_cast<std::size_t>(data[1]) << 8 | data[2];
  const std::string_view block(reinterpret_cast<const char*>(data + 3), size - 3);
  switch (data[0] % 8) {
    case 0:
      pack(block, expected, data[0]);
      break;
    case 1:
      unpack({.bytes = std::string(block)}, expected);
      break;
    case 2:
      unpack({.lz4 = true, .bytes = std::string(block)}, std::size_t{expected} << 4);
      break;
    default:
      unpack({.lz4 = true, .bytes = std::string(block)}, expected);
      break;
  }
  return 0;
}
