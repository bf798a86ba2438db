#include "net/codec.h"

#include <lz4.h>

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace infemeral {
namespace {

// A larger payload is judged by a sample from its middle first, so that the usual, incompressible
// payload costs the same at any size: 4 us more than a plain copy for 512 f16 rows of 4096 (4 MiB)
// on a Xeon at 2 GHz, `codec_test "[.timing]"`.
constexpr std::size_t kSampleBytes = 64 * 1024;

// One byte of an LZ4 block stands for at most 255 bytes of output.
constexpr std::size_t kMaxRatio = 255;

// Compresses into `out` if that saves at least 1/8.
bool compress(std::span<const std::byte> in, std::string& out) {
  const std::size_t capacity = in.size() - in.size() / kMinSavingDivisor;
  out.resize(capacity);
  const int size = LZ4_compress_default(reinterpret_cast<const char*>(in.data()), out.data(),
                                        static_cast<int>(in.size()), static_cast<int>(capacity));
  out.resize(static_cast<std::size_t>(std::max(size, 0)));
  return size > 0;
}

bool sample_pays(std::span<const std::byte> in) {
  std::string scratch;
  return compress(in.subspan((in.size() - kSampleBytes) / 2, kSampleBytes), scratch);
}

}  // namespace

PackedTensor pack_tensor(WireDtype dtype, std::span<const std::byte> rows) {
  PackedTensor packed{.dtype = dtype};
  const bool worth_trying = rows.size() > kMinCompressBytes && rows.size() <= LZ4_MAX_INPUT_SIZE &&
                            (rows.size() <= kSampleBytes || sample_pays(rows));
  packed.lz4 = worth_trying && compress(rows, packed.bytes);
  if (!packed.lz4) {
    packed.bytes.assign(reinterpret_cast<const char*>(rows.data()), rows.size());
  }
  return packed;
}

absl::Status unpack_tensor(const PackedTensor& packed, std::size_t expected,
                           std::vector<std::byte>& rows) {
  const std::size_t size = packed.bytes.size();
  if (!packed.lz4) {
    if (size != expected) {
      return absl::InvalidArgumentError(
          absl::StrCat("a tensor of ", expected, " bytes came with ", size));
    }
    const auto* begin = reinterpret_cast<const std::byte*>(packed.bytes.data());
    rows.assign(begin, begin + size);
    return absl::OkStatus();
  }
  const bool possible = expected > kMinCompressBytes && expected <= LZ4_MAX_INPUT_SIZE &&
                        size <= expected && expected / kMaxRatio <= size;
  if (possible) {
    rows.resize(expected);
    const int unpacked =
        LZ4_decompress_safe(packed.bytes.data(), reinterpret_cast<char*>(rows.data()),
                            static_cast<int>(size), static_cast<int>(expected));
    if (unpacked >= 0 && static_cast<std::size_t>(unpacked) == expected) return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrCat("a compressed tensor of ", size,
                                                 " bytes does not unpack to the ", expected,
                                                 " bytes of its rows"));
}

}  // namespace infemeral
