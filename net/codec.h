// Tensors on their way: rows in the wire format (engine/wire.h), compressed when that pays.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
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

// A tensor of one row is sent as it is: what LZ4 finds in cloaked states is that rows repeat.
PackedTensor pack_tensor(WireDtype dtype, std::span<const std::byte> tensor, std::size_t rows);

// Writes exactly `expected` bytes to `rows`, which the receiver knows from the row count, the dtype
// and the hidden size. InvalidArgument when the packed bytes do not make exactly that many; nothing
// is allocated for raw bytes of a wrong size or for a block that could never unpack to `expected`.
absl::Status unpack_tensor(const PackedTensor& packed, std::size_t expected,
                           std::vector<std::byte>& rows);

// The same for values: whole rows of hidden_size each.
PackedTensor pack_rows(WireDtype dtype, std::span<const float> values, std::size_t hidden_size);
// rows x hidden_size values. InvalidArgument as above, and for a value that is not finite.
absl::StatusOr<std::vector<float>> unpack_rows(const PackedTensor& packed, std::size_t rows,
                                               std::size_t hidden_size);

bool all_finite(std::span<const float> values);

}  // namespace infemeral
