// Everything that a stranger can say: handshake messages in both roles and records behind them. The
// first byte chooses; the keys are fixed, so that a corpus stays good.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

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

std::span<const std::byte> bytes_of(const std::string& text) {
  return std::as_bytes(std::span<const char>(text));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size == 0) return 0;
  static const Identity client = Identity::from_secret(fixed_key(1));
  static const Identity server = Identity::from_secret(fixed_key(2));
  const std::span<const std::byte> input = std::as_bytes(std::span(data + 1, size - 1));
  const std::string prologue = noise_prologue(kProtocolVersion, kSuite);
  auto initiator = *NoiseHandshake::initiator(kSuite, bytes_of(prologue), client,
                                              server.public_key(), fixed_key(3));
  auto responder = *NoiseHandshake::responder(kSuite, bytes_of(prologue), server, fixed_key(4));
  std::string first;
  std::string second;
  std::string payload;
  check(initiator.write_message({}, first).ok());
  switch (data[0] % 3) {
    case 0:  // message 1, to the server
      if (responder.read_message(input, payload).ok()) {
        check(responder.write_message({}, second).ok() && responder.split().ok());
      } else {
        check(payload.empty() && !responder.write_message({}, second).ok());
      }
      return 0;
    case 1:  // message 2, to the client
      if (!initiator.read_message(input, payload).ok()) {
        check(payload.empty() && !initiator.split().ok());
      }
      return 0;
    default:
      break;
  }
  // Records. The nonces are fixed too, so the fuzzer can only find authentic ones in its corpus.
  check(responder.read_message(bytes_of(first), payload).ok());
  check(responder.write_message({}, second).ok());
  FrameOpener opener(std::move(responder.split()->receive));
  std::vector<std::string> frames;
  if (opener.open(input, kMaxFrameOverhead, frames).ok()) {
    for (const std::string& frame : frames) check(frame.size() <= kMaxFrameOverhead);
  } else {
    // Given up: nothing opens any more.
    check(!opener.open(input, kMaxFrameOverhead, frames).ok());
  }
  return 0;
}
