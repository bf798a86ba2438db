// Frames through the encrypted channel: cut into Noise messages, and put together again. No I/O.
//
// Records. Every Noise message travels behind its length:
//
//   2 bytes  length of the Noise message, big-endian, 17 .. 65,535
//   n bytes  the Noise message; its plaintext is
//              1 byte   flags: 1, more of the frame follows; 2, this direction's next record has
//                       the next key (Noise's Rekey)
//              rest     the piece
//
// Every piece but a frame's last fills its record (65,518 bytes). An envelope's data holds whole
// records; this end puts at most kRecordsPerEnvelope into one, so that a long frame is encrypted,
// sent and decrypted at the same time, and an end never has to accept envelopes as large as a
// frame.
//
// The prologue binds what was agreed in the clear: the service, the protocol version and the
// cipher. The model fingerprint is not in it. With one there, a client that was prepared for
// another model would fail exactly like a client with a wrong key, and neither end could say which
// it was; so the fingerprint and the cloak commitment are compared in Open, inside the encrypted
// channel, where the answer names what does not fit and nobody else sees them.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "net/noise.h"

namespace infemeral {

inline constexpr std::size_t kMaxPiece = kNoiseMaxPayload - 1;
inline constexpr std::size_t kRecordsPerEnvelope = 4;
// What either end must accept as one gRPC message; four records need 262,148 bytes and a little.
inline constexpr int kMaxEnvelopeBytes = 512 * 1024;

// "Infemeral/SplitInference", then version and cipher as 4 bytes each, big-endian: 32 bytes.
std::string noise_prologue(std::uint32_t version, CipherSuite suite);

// One direction's sending end.
class FrameSealer {
 public:
  explicit FrameSealer(CipherState cipher, RekeyLimits limits = {})
      : cipher_(std::move(cipher)), limits_(limits) {}

  // Encrypts the next piece of a frame into `data`, which replaces what it held, and drops that
  // piece from `rest`. To be called until `rest` is empty.
  absl::Status seal(std::span<const std::byte>& rest, std::string& data);

 private:
  using Clock = std::chrono::steady_clock;

  // Whether a record of so many bytes is the last one under this key.
  bool ends_key(std::size_t bytes);

  CipherState cipher_;
  const RekeyLimits limits_;
  std::uint64_t sealed_ = 0;  // bytes under this key
  Clock::time_point key_since_ = Clock::now();
  std::string plaintext_;  // of one record
};

// One direction's receiving end.
class FrameOpener {
 public:
  explicit FrameOpener(CipherState cipher) : cipher_(std::move(cipher)) {}

  // Decrypts an envelope's records and appends the frames that they complete. `max_frame` bounds a
  // frame's bytes. Errors end the connection: DataLoss for damaged records, ResourceExhausted for a
  // frame beyond the limit.
  absl::Status open(std::span<const std::byte> data, std::size_t max_frame,
                    std::vector<std::string>& frames);

 private:
  CipherState cipher_;
  std::string plaintext_;  // of one record
  std::string frame_;      // the pieces so far
};

}  // namespace infemeral
