// Frames through the encrypted channel: cut into Noise messages, and put together again. No I/O.
//
// Records. Every Noise message travels behind its length:
//
//   2 bytes  length of the Noise message, big-endian, 17 .. 65,535
//   n bytes  the Noise message; its plaintext is
//              1 byte   0: this piece ends the frame; 1: more follows
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

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
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

class SecureChannel {
 public:
  explicit SecureChannel(NoiseTransport transport) : transport_(std::move(transport)) {}

  // Encrypts the next piece of a frame into `data`, which replaces what it held, and drops that
  // piece from `rest`. To be called until `rest` is empty.
  absl::Status seal(std::span<const std::byte>& rest, std::string& data);

  // Decrypts an envelope's records and appends the frames that they complete. `max_frame` bounds a
  // frame's bytes. Errors end the connection: DataLoss for damaged records, ResourceExhausted for a
  // frame beyond the limit.
  absl::Status open(std::span<const std::byte> data, std::size_t max_frame,
                    std::vector<std::string>& frames);

  const PublicKey& remote_static() const { return transport_.remote_static; }

 private:
  NoiseTransport transport_;
  std::string plaintext_;  // of one record
  std::string frame_;      // the pieces so far
};

}  // namespace infemeral
