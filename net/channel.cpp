#include "net/channel.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "net/bytes.h"

namespace infemeral {
namespace {

using Bytes = std::span<const std::byte>;

constexpr char kMore = 1;
constexpr char kRekey = 2;

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

bool FrameSealer::ends_key(std::size_t bytes) {
  sealed_ += bytes;
  const Clock::time_point now = Clock::now();
  if (sealed_ < limits_.bytes && now - key_since_ < limits_.age) return false;
  sealed_ = 0;
  key_since_ = now;
  return true;
}

absl::Status FrameSealer::seal(Bytes& rest, std::string& data) {
  const std::size_t take = std::min(rest.size(), kRecordsPerEnvelope * kMaxPiece);
  data.clear();
  data.reserve(take + kRecordsPerEnvelope * (2 + 1 + kNoiseTagSize));
  for (Bytes part = rest.first(take); !part.empty();) {
    const std::size_t size = std::min(part.size(), kMaxPiece);
    const bool last = size == part.size() && take == rest.size();
    const bool rekey = ends_key(1 + size);
    plaintext_.assign(1, static_cast<char>((last ? 0 : kMore) | (rekey ? kRekey : 0)));
    plaintext_.append(reinterpret_cast<const char*>(part.data()), size);
    append_big_endian(static_cast<std::uint32_t>(plaintext_.size() + kNoiseTagSize), 2, data);
    absl::Status status = cipher_.encrypt({}, bytes_of(plaintext_), data);
    if (!status.ok()) return status;
    if (rekey) cipher_.rekey();
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

    const char flags = plaintext_[0];
    const bool last = (flags & kMore) == 0;
    if ((flags & ~(kMore | kRekey)) != 0 || (!last && plaintext_.size() != kNoiseMaxPayload)) {
      return absl::DataLossError("a record of the encrypted channel does not follow the protocol");
    }
    if ((flags & kRekey) != 0) cipher_.rekey();
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
