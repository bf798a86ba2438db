// Tensors on their way: rows in the wire format (engine/wire.h), compressed when that pays.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "engine/wire.h"

namespace infemeral {

// Cloaked states look like Gaussian noise and LZ4 saves nothing on them; it pays for repeated rows
// and for a body whose values are mostly zero.
inline constexpr std::size_t kMinCompressBytes = 4096;  // at or below this: never
inline constexpr std::size_t kMinSavingDivisor = 8;     // compressed only if it saves 1/8

struct PackedTensor {
  WireDtype dtype = WireDtype::kF16;
  bool lz4 = false;   // `bytes` is one LZ4 block
  std::string bytes;  // else the rows themselves
};

PackedTensor pack_tensor(WireDtype dtype, std::span<const std::byte> rows);

// Writes exactly `expected` bytes to `rows`, which the receiver knows from the row count, the dtype
// and the hidden size. InvalidArgument when the packed bytes do not make exactly that many; nothing
// is allocated for raw bytes of a wrong size or for a block that could never unpack to `expected`.
absl::Status unpack_tensor(const PackedTensor& packed, std::size_t expected,
                           std::vector<std::byte>& rows);

}  // namespace infemeral
