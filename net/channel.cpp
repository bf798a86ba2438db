#include "net/channel.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "net/bytes.h"

namespace infemeral {
namespace {

using Bytes = std::span<const std::byte>;

constexpr char kLast = 0;
constexpr char kMore = 1;

void append_big_endian(std::uint32_t value, int bytes, std::string& out) {
  for (int shift = 8 * (bytes - 1); shift >= 0; shift -= 8) {
    out.push_back(static_cast<char>(value >> shift));
  }
}

}  // namespace

std::string noise_prologue(std::uint32_t version, CipherSuite suite) {
  std::string prologue = "Infemeral/SplitInference";
  append_big_endian(version, 4, prologue);
  append_big_endian(static_cast<std::uint32_t>(suite), 4, prologue);
  return prologue;
}

absl::Status FrameSealer::seal(Bytes& rest, std::string& data) {
  const std::size_t take = std::min(rest.size(), kRecordsPerEnvelope * kMaxPiece);
  data.clear();
  data.reserve(take + kRecordsPerEnvelope * (2 + 1 + kNoiseTagSize));
  for (Bytes part = rest.first(take); !part.empty();) {
    const std::size_t size = std::min(part.size(), kMaxPiece);
    const bool last = size == part.size() && take == rest.size();
    plaintext_.assign(1, last ? kLast : kMore);
    plaintext_.append(reinterpret_cast<const char*>(part.data()), size);
    append_big_endian(static_cast<std::uint32_t>(plaintext_.size() + kNoiseTagSize), 2, data);
    absl::Status status = cipher_.encrypt({}, bytes_of(plaintext_), data);
    if (!status.ok()) return status;
    part = part.subspan(size);
  }
  rest = rest.subspan(take);
  return absl::OkStatus();
}

absl::Status FrameOpener::open(Bytes data, std::size_t max_frame,
                               std::vector<std::string>& frames) {
  if (data.empty()) return absl::DataLossError("an envelope came without records");
  while (!data.empty()) {
    const std::size_t length = data.size() < 2 ? 0
                                               : std::to_integer<std::size_t>(data[0]) << 8 |
                                                     std::to_integer<std::size_t>(data[1]);
    if (length <= kNoiseTagSize || length > data.size() - 2) {
      return absl::DataLossError("a record of the encrypted channel is cut or malformed");
    }
    plaintext_.clear();
    absl::Status status = cipher_.decrypt({}, data.subspan(2, length), plaintext_);
    if (!status.ok()) return status;
    data = data.subspan(2 + length);

    const bool last = plaintext_[0] == kLast;
    if (!last && (plaintext_[0] != kMore || plaintext_.size() != kNoiseMaxPayload)) {
      return absl::DataLossError("a record of the encrypted channel does not follow the protocol");
    }
    if (plaintext_.size() - 1 > max_frame - std::min(max_frame, frame_.size())) {
      return absl::ResourceExhaustedError(
          absl::StrCat("a frame is larger than the ", max_frame, " bytes that are allowed here"));
    }
    frame_.append(plaintext_, 1);
    if (last) frames.push_back(std::exchange(frame_, {}));
  }
  return absl::OkStatus();
}

}  // namespace infemeral
