// Everything that a stranger can say: handshake messages in both roles and records behind them. The
// first byte chooses; the keys are fixed, so that a corpus stays good.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "net/bytes.h"
#include "net/channel.h"
#include "net/frames.h"
#include "net/noise.h"

namespace {

using namespace infemeral;
constexpr CipherSuite kSuite = CipherSuite::kChaChaPoly;

void check(bool holds) {
  if (!holds) std::abort();
}

SecretKey fixed_key(std::uint8_t fill) {
  SecretKey key;
  std::memset(key.data(), fill, key.size());
  return key;
}

// Message 1, as the server reads it.
void read_first(std::span<const std::byte> input, const std::string& prologue) {
  static const Identity server = Identity::from_secret(fixed_key(2));
  auto responder = *NoiseHandshake::responder(kSuite, bytes_of(prologue), server, fixed_key(4));
  std::string payload;
  std::string answer;
  if (responder.read_message(input, payload).ok()) {
    check(responder.write_message({}, answer).ok() && responder.split().ok());
  } else {
    check(payload.empty() && !responder.write_message({}, answer).ok());
  }
}

// Message 2, as the client reads it.
void read_second(std::span<const std::byte> input, const std::string& prologue) {
  static const Identity client = Identity::from_secret(fixed_key(1));
  static const PublicKey server = Identity::from_secret(fixed_key(2)).public_key();
  auto initiator =
      *NoiseHandshake::initiator(kSuite, bytes_of(prologue), client, server, fixed_key(3));
  std::string first;
  std::string payload;
  check(initiator.write_message({}, first).ok());
  if (initiator.read_message(input, payload).ok()) {
    check(initiator.split().ok());
  } else {
    check(payload.empty() && !initiator.split().ok());
  }
}

void read_records(std::span<const std::byte> input) {
  FrameOpener opener(CipherState(kSuite, fixed_key(5)));
  std::vector<std::string> frames;
  if (opener.open(input, kMaxFrameOverhead, frames).ok()) {
    for (const std::string& frame : frames) check(frame.size() <= kMaxFrameOverhead);
  } else {
    // Given up: nothing opens any more.
    check(!opener.open(input, kMaxFrameOverhead, frames).ok());
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size == 0) return 0;
  static const std::string prologue = noise_prologue(kProtocolVersion, kSuite);
  const std::span<const std::byte> input = std::as_bytes(std::span(data + 1, size - 1));
  switch (data[0] % 3) {
    case 0:
      read_first(input, prologue);
      break;
    case 1:
      read_second(input, prologue);
      break;
    default:
      read_records(input);
      break;
  }
  return 0;
}
