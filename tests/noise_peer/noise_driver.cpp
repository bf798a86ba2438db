// One end of the channel behind a pipe, for a peer in another language. A line in, a line out; all
// values in hex, "-" for no bytes.
//
//   initiator CIPHER SECRET REMOTE   starts a handshake -> ok
//   responder CIPHER SECRET
//   write PAYLOAD                    -> a handshake message, later a transport message
//   read MESSAGE                     -> its payload
//   hash                             -> the handshake hash
//   records BYTES                    from here on the transport carries frames, and this end's keys
//                                    are replaced after so many bytes -> ok
//   seal FRAME                       -> its records
//   open RECORDS                     -> the frame that they complete
//   anything that fails              -> error CODE
#include <sodium.h>

#include <cstring>
#include <iostream>
#include <optional>
#include <sstream>
#include <string>

#include "net/bytes.h"
#include "net/channel.h"
#include "net/frames.h"
#include "net/noise.h"

namespace infemeral {
namespace {

constexpr std::size_t kMaxFrame = 1 << 20;

std::string to_hex(const std::string& bytes) {
  if (bytes.empty()) return "-";
  std::string hex(2 * bytes.size() + 1, '\0');
  sodium_bin2hex(hex.data(), hex.size(), reinterpret_cast<const unsigned char*>(bytes.data()),
                 bytes.size());
  hex.pop_back();
  return hex;
}

std::string from_hex(const std::string& hex) {
  std::string bytes(hex.size() / 2, '\0');
  std::size_t size = 0;
  sodium_hex2bin(reinterpret_cast<unsigned char*>(bytes.data()), bytes.size(), hex.data(),
                 hex.size(), nullptr, &size, nullptr);
  bytes.resize(size);
  return bytes;
}

class Driver {
 public:
  absl::StatusOr<std::string> run(const std::string& command, std::istringstream& words) {
    std::string argument;
    if (command == "initiator" || command == "responder") return start(command, words);
    if (command == "hash") {
      return std::string(transport_->handshake_hash.begin(), transport_->handshake_hash.end());
    }
    words >> argument;
    if (command == "records") {
      sealer_.emplace(std::move(transport_->send), RekeyLimits{.bytes = std::stoull(argument)});
      opener_.emplace(std::move(transport_->receive));
      return std::string();
    }
    const std::string in = from_hex(argument);
    std::string out;
    absl::Status status;
    if (command == "write") {
      status = transport_ ? transport_->send.encrypt({}, bytes_of(in), out)
                          : handshake_->write_message(bytes_of(in), out);
    } else if (command == "read") {
      status = transport_ ? transport_->receive.decrypt({}, bytes_of(in), out)
                          : handshake_->read_message(bytes_of(in), out);
    } else if (command == "seal") {
      std::string data;
      for (std::span<const std::byte> rest = bytes_of(in); status.ok() && !rest.empty();) {
        status = sealer_->seal(rest, data);
        out += data;
      }
    } else if (command == "open") {
      std::vector<std::string> frames;
      status = opener_->open(bytes_of(in), kMaxFrame, frames);
      if (status.ok() && frames.size() != 1) status = absl::InternalError("not one frame");
      if (status.ok()) out = frames.front();
    } else {
      status = absl::InvalidArgumentError("unknown command");
    }
    if (!status.ok()) return status;
    if (!transport_ && handshake_->finished()) transport_.emplace(*handshake_->split());
    return out;
  }

 private:
  absl::StatusOr<std::string> start(const std::string& role, std::istringstream& words) {
    std::uint32_t cipher = 0;
    std::string secret_hex;
    std::string remote_hex;
    words >> cipher >> secret_hex >> remote_hex;
    const std::string secret = from_hex(secret_hex);
    SecretKey key;
    std::memcpy(key.data(), secret.data(), std::min(secret.size(), key.size()));
    const Identity self = Identity::from_secret(std::move(key));
    const CipherSuite suite = *cipher_suite_from_number(cipher);
    const std::string prologue = noise_prologue(kProtocolVersion, suite);
    absl::StatusOr<NoiseHandshake> handshake = absl::InternalError("");
    if (role == "initiator") {
      const std::string remote = from_hex(remote_hex);
      PublicKey remote_key{};
      std::memcpy(remote_key.data(), remote.data(), std::min(remote.size(), remote_key.size()));
      handshake = NoiseHandshake::initiator(suite, bytes_of(prologue), self, remote_key);
    } else {
      handshake = NoiseHandshake::responder(suite, bytes_of(prologue), self);
    }
    if (!handshake.ok()) return handshake.status();
    handshake_.emplace(*std::move(handshake));
    transport_.reset();
    return std::string();
  }

  std::optional<NoiseHandshake> handshake_;
  std::optional<NoiseTransport> transport_;
  std::optional<FrameSealer> sealer_;
  std::optional<FrameOpener> opener_;
};

}  // namespace
}  // namespace infemeral

int main() {
  infemeral::Driver driver;
  std::string line;
  while (std::getline(std::cin, line)) {
    std::istringstream words(line);
    std::string command;
    words >> command;
    const absl::StatusOr<std::string> answer = driver.run(command, words);
    if (answer.ok()) {
      std::cout << infemeral::to_hex(*answer) << std::endl;
    } else {
      std::cout << "error " << static_cast<int>(answer.status().code()) << std::endl;
    }
  }
}
