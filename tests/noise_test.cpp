#include "net/noise.h"

#include <catch2/catch.hpp>
#include <cstring>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <random>

#include "net/bytes.h"
#include "net/secret.h"

namespace infemeral {
namespace {

using Bytes = std::span<const std::byte>;
constexpr CipherSuite kSuites[] = {CipherSuite::kAesGcm, CipherSuite::kChaChaPoly};

std::string random_text(std::size_t size) {
  std::string text(size, '\0');
  randombytes_buf(text.data(), text.size());
  return text;
}

std::string unhex(const std::string& hex) {
  std::string out(hex.size() / 2, '\0');
  std::size_t size = 0;
  REQUIRE(sodium_hex2bin(reinterpret_cast<unsigned char*>(out.data()), out.size(), hex.data(),
                         hex.size(), nullptr, &size, nullptr) == 0);
  REQUIRE(size == out.size());
  return out;
}

SecretKey secret_of(const std::string& hex) {
  const std::string text = unhex(hex);
  SecretKey key;
  REQUIRE(text.size() == key.size());
  std::memcpy(key.data(), text.data(), text.size());
  return key;
}

PublicKey public_of(const std::string& hex) {
  PublicKey key{};
  const std::string text = unhex(hex);
  REQUIRE(text.size() == key.size());
  std::memcpy(key.data(), text.data(), text.size());
  return key;
}

bool skip_unavailable(CipherSuite suite) {
  if (cipher_suite_available(suite)) return false;
  WARN("skipped " << cipher_suite_name(suite) << ": this processor has no instructions for it");
  return true;
}

// Two ends in front of their handshake.
struct Ends {
  Identity client = Identity::generate();
  Identity server = Identity::generate();
  std::string prologue = random_text(30);
  NoiseHandshake initiator;
  NoiseHandshake responder;

  explicit Ends(CipherSuite suite)
      : initiator(
            *NoiseHandshake::initiator(suite, bytes_of(prologue), client, server.public_key())),
        responder(*NoiseHandshake::responder(suite, bytes_of(prologue), server)) {}
};

struct Channel {
  NoiseTransport client;
  NoiseTransport server;
};

Channel connect(CipherSuite suite) {
  Ends ends(suite);
  std::string first, second, payload;
  REQUIRE(ends.initiator.write_message({}, first).ok());
  REQUIRE(first.size() == kNoiseMessage1Size);
  REQUIRE(ends.responder.read_message(bytes_of(first), payload).ok());
  REQUIRE(ends.responder.remote_static() == ends.client.public_key());
  REQUIRE(ends.responder.write_message({}, second).ok());
  REQUIRE(second.size() == kNoiseMessage2Size);
  REQUIRE(ends.initiator.read_message(bytes_of(second), payload).ok());
  REQUIRE(payload.empty());
  Channel channel{*ends.initiator.split(), *ends.responder.split()};
  REQUIRE(channel.client.handshake_hash == channel.server.handshake_hash);
  REQUIRE(channel.server.remote_static == ends.client.public_key());
  REQUIRE(!ends.initiator.split().ok());
  return channel;
}

std::string seal(CipherState& state, const std::string& plaintext) {
  std::string out;
  REQUIRE(state.encrypt({}, bytes_of(plaintext), out).ok());
  REQUIRE(out.size() == plaintext.size() + kNoiseTagSize);
  return out;
}

// Refused, leaves the output alone and refuses everything afterwards.
void check_refused(CipherState& state, const std::string& message, const std::string& good) {
  std::string out = "before";
  CHECK(state.decrypt({}, bytes_of(message), out).code() == absl::StatusCode::kDataLoss);
  CHECK(out == "before");
  CHECK(state.decrypt({}, bytes_of(good), out).code() == absl::StatusCode::kFailedPrecondition);
  CHECK(out == "before");
}

}  // namespace

TEST_CASE("the public Noise IK vectors are reproduced") {
  std::ifstream file(INFEMERAL_TEST_DATA "/noise_ik_vectors.json");
  REQUIRE(file);
  const nlohmann::json vectors = nlohmann::json::parse(file).at("vectors");
  std::size_t checked = 0;
  for (CipherSuite suite : kSuites) {
    if (skip_unavailable(suite)) continue;
    for (const nlohmann::json& v : vectors) {
      if (v.at("protocol_name") != cipher_suite_name(suite)) continue;
      auto identity = [](const std::string& hex) { return Identity::from_secret(secret_of(hex)); };
      const std::string init_prologue = unhex(v.at("init_prologue"));
      const std::string resp_prologue = unhex(v.at("resp_prologue"));
      NoiseHandshake initiator = *NoiseHandshake::initiator(
          suite, bytes_of(init_prologue), identity(v.at("init_static")),
          public_of(v.at("init_remote_static")), secret_of(v.at("init_ephemeral")));
      NoiseHandshake responder =
          *NoiseHandshake::responder(suite, bytes_of(resp_prologue), identity(v.at("resp_static")),
                                     secret_of(v.at("resp_ephemeral")));
      const nlohmann::json& messages = v.at("messages");
      for (std::size_t i = 0; i < 2; ++i) {
        NoiseHandshake& writer = i == 0 ? initiator : responder;
        NoiseHandshake& reader = i == 0 ? responder : initiator;
        const std::string payload = unhex(messages[i].at("payload"));
        std::string message, received;
        REQUIRE(writer.write_message(bytes_of(payload), message).ok());
        CHECK(message == unhex(messages[i].at("ciphertext")));
        REQUIRE(reader.read_message(bytes_of(message), received).ok());
        CHECK(received == payload);
      }
      Channel channel{*initiator.split(), *responder.split()};
      const std::string hash = unhex(v.at("handshake_hash"));
      CHECK(std::memcmp(channel.client.handshake_hash.data(), hash.data(), 32) == 0);
      CHECK(std::memcmp(channel.server.handshake_hash.data(), hash.data(), 32) == 0);
      for (std::size_t i = 2; i < messages.size(); ++i) {
        NoiseTransport& writer = i % 2 == 0 ? channel.client : channel.server;
        NoiseTransport& reader = i % 2 == 0 ? channel.server : channel.client;
        const std::string payload = unhex(messages[i].at("payload"));
        const std::string message = seal(writer.send, payload);
        CHECK(message == unhex(messages[i].at("ciphertext")));
        std::string received;
        REQUIRE(reader.receive.decrypt({}, bytes_of(message), received).ok());
        CHECK(received == payload);
      }
      ++checked;
    }
  }
  CHECK(checked >= 1);
}

TEST_CASE("transport messages of every size up to 65,519 bytes and not one more") {
  for (CipherSuite suite : kSuites) {
    if (skip_unavailable(suite)) continue;
    Channel channel = connect(suite);
    for (std::size_t size : {0, 1, 15, 16, 17, 1000, 65518, 65519}) {
      const std::string plaintext = random_text(size);
      std::string received;
      REQUIRE(channel.server.receive
                  .decrypt({}, bytes_of(seal(channel.client.send, plaintext)), received)
                  .ok());
      CHECK(received == plaintext);
    }
    std::string out;
    CHECK(channel.client.send.encrypt({}, bytes_of(random_text(65520)), out).code() ==
          absl::StatusCode::kInvalidArgument);
    CHECK(out.empty());
    // The refusal used no nonce: the channel goes on.
    std::string received;
    CHECK(channel.server.receive.decrypt({}, bytes_of(seal(channel.client.send, "x")), received)
              .ok());
    check_refused(channel.server.receive, std::string(65536, 'x'), seal(channel.client.send, "y"));
  }
}

TEST_CASE("handshake payloads up to the largest message and not one byte more") {
  for (CipherSuite suite : kSuites) {
    if (skip_unavailable(suite)) continue;
    Ends ends(suite);
    std::string message, payload;
    CHECK(ends.initiator.write_message(bytes_of(random_text(65535 - 95)), message).code() ==
          absl::StatusCode::kInvalidArgument);
    const std::string largest = random_text(65535 - 96);
    REQUIRE(ends.initiator.write_message(bytes_of(largest), message).ok());
    CHECK(message.size() == kNoiseMaxMessage);
    REQUIRE(ends.responder.read_message(bytes_of(message), payload).ok());
    CHECK(payload == largest);
  }
}

TEST_CASE("replayed, reordered, truncated, extended and reflected messages are refused") {
  for (CipherSuite suite : kSuites) {
    if (skip_unavailable(suite)) continue;
    const std::string text = random_text(100);
    SECTION("replayed " + cipher_suite_name(suite)) {
      Channel channel = connect(suite);
      const std::string message = seal(channel.client.send, text);
      std::string out;
      REQUIRE(channel.server.receive.decrypt({}, bytes_of(message), out).ok());
      check_refused(channel.server.receive, message, seal(channel.client.send, text));
    }
    SECTION("reordered " + cipher_suite_name(suite)) {
      Channel channel = connect(suite);
      const std::string first = seal(channel.client.send, text);
      const std::string second = seal(channel.client.send, text);
      check_refused(channel.server.receive, second, first);
    }
    SECTION("cut at every byte " + cipher_suite_name(suite)) {
      for (std::size_t size = 0; size < text.size() + kNoiseTagSize; ++size) {
        Channel channel = connect(suite);
        const std::string message = seal(channel.client.send, text);
        check_refused(channel.server.receive, message.substr(0, size), message);
      }
    }
    SECTION("extended " + cipher_suite_name(suite)) {
      Channel channel = connect(suite);
      const std::string message = seal(channel.client.send, text);
      check_refused(channel.server.receive, message + 'x', message);
    }
    SECTION("reflected " + cipher_suite_name(suite)) {
      Channel channel = connect(suite);
      const std::string message = seal(channel.client.send, text);
      check_refused(channel.client.receive, message, seal(channel.server.send, text));
    }
    SECTION("another connection's " + cipher_suite_name(suite)) {
      Channel channel = connect(suite);
      Channel other = connect(suite);
      check_refused(channel.server.receive, seal(other.client.send, text),
                    seal(channel.client.send, text));
    }
    SECTION("with associated data that the writer did not give " + cipher_suite_name(suite)) {
      Channel channel = connect(suite);
      std::string out;
      CHECK(channel.server.receive
                .decrypt(bytes_of("x"), bytes_of(seal(channel.client.send, text)), out)
                .code() == absl::StatusCode::kDataLoss);
    }
  }
}

TEST_CASE("every flipped bit of a transport message is refused") {
  for (CipherSuite suite : kSuites) {
    if (skip_unavailable(suite)) continue;
    const std::string text = random_text(40);
    for (std::size_t bit = 0; bit < 8 * (text.size() + kNoiseTagSize); ++bit) {
      Channel channel = connect(suite);
      const std::string message = seal(channel.client.send, text);
      std::string damaged = message;
      damaged[bit / 8] = static_cast<char>(damaged[bit / 8] ^ (1 << bit % 8));
      check_refused(channel.server.receive, damaged, message);
    }
  }
}

TEST_CASE("every flipped bit of both handshake messages is refused") {
  for (CipherSuite suite : kSuites) {
    if (skip_unavailable(suite)) continue;
    for (std::size_t bit = 0; bit < 8 * kNoiseMessage1Size; ++bit) {
      Ends ends(suite);
      std::string message, payload;
      REQUIRE(ends.initiator.write_message({}, message).ok());
      std::string damaged = message;
      damaged[bit / 8] = static_cast<char>(damaged[bit / 8] ^ (1 << bit % 8));
      CAPTURE(bit);
      CHECK(ends.responder.read_message(bytes_of(damaged), payload).code() ==
            absl::StatusCode::kUnauthenticated);
      CHECK(!ends.responder.read_message(bytes_of(message), payload).ok());
      CHECK(!ends.responder.write_message({}, payload).ok());
      CHECK(payload.empty());
    }
    for (std::size_t bit = 0; bit < 8 * kNoiseMessage2Size; ++bit) {
      Ends ends(suite);
      std::string first, second, payload;
      REQUIRE(ends.initiator.write_message({}, first).ok());
      REQUIRE(ends.responder.read_message(bytes_of(first), payload).ok());
      REQUIRE(ends.responder.write_message({}, second).ok());
      second[bit / 8] = static_cast<char>(second[bit / 8] ^ (1 << bit % 8));
      CAPTURE(bit);
      CHECK(ends.initiator.read_message(bytes_of(second), payload).code() ==
            absl::StatusCode::kUnauthenticated);
      CHECK(!ends.initiator.split().ok());
    }
  }
}

TEST_CASE("handshake messages cut or extended at every byte are refused") {
  for (CipherSuite suite : kSuites) {
    if (skip_unavailable(suite)) continue;
    for (std::size_t size = 0; size <= kNoiseMessage1Size + 1; ++size) {
      if (size == kNoiseMessage1Size) continue;
      Ends ends(suite);
      std::string message, payload;
      REQUIRE(ends.initiator.write_message({}, message).ok());
      message.resize(size);
      CHECK(!ends.responder.read_message(bytes_of(message), payload).ok());
    }
    for (std::size_t size = 0; size <= kNoiseMessage2Size + 1; ++size) {
      if (size == kNoiseMessage2Size) continue;
      Ends ends(suite);
      std::string first, second, payload;
      REQUIRE(ends.initiator.write_message({}, first).ok());
      REQUIRE(ends.responder.read_message(bytes_of(first), payload).ok());
      REQUIRE(ends.responder.write_message({}, second).ok());
      second.resize(size);
      CHECK(!ends.initiator.read_message(bytes_of(second), payload).ok());
    }
  }
}

TEST_CASE("wrong keys, prologues and ciphers end the handshake") {
  const Identity client = Identity::generate();
  const Identity server = Identity::generate();
  const Identity other = Identity::generate();
  const CipherSuite suite = CipherSuite::kChaChaPoly;
  const std::string prologue = "prologue", payload_before = "before";
  std::string first, payload = payload_before;

  SECTION("the client pinned another server") {
    auto initiator =
        *NoiseHandshake::initiator(suite, bytes_of(prologue), client, other.public_key());
    auto responder = *NoiseHandshake::responder(suite, bytes_of(prologue), server);
    REQUIRE(initiator.write_message({}, first).ok());
    CHECK(responder.read_message(bytes_of(first), payload).code() ==
          absl::StatusCode::kUnauthenticated);
  }
  SECTION("a server without the pinned key answers") {
    auto initiator =
        *NoiseHandshake::initiator(suite, bytes_of(prologue), client, server.public_key());
    REQUIRE(initiator.write_message({}, first).ok());
    // The impostor knows the client's key but not the server's: it completes a handshake with
    // itself and sends that answer.
    auto own = *NoiseHandshake::initiator(suite, bytes_of(prologue), client, other.public_key());
    auto impostor = *NoiseHandshake::responder(suite, bytes_of(prologue), other);
    std::string message, second;
    REQUIRE(own.write_message({}, message).ok());
    REQUIRE(impostor.read_message(bytes_of(message), payload).ok());
    REQUIRE(impostor.write_message({}, second).ok());
    CHECK(initiator.read_message(bytes_of(second), payload).code() ==
          absl::StatusCode::kUnauthenticated);
  }
  SECTION("the prologues differ") {
    auto initiator =
        *NoiseHandshake::initiator(suite, bytes_of(prologue), client, server.public_key());
    auto responder = *NoiseHandshake::responder(suite, bytes_of("prologuf"), server);
    REQUIRE(initiator.write_message({}, first).ok());
    CHECK(responder.read_message(bytes_of(first), payload).code() ==
          absl::StatusCode::kUnauthenticated);
  }
  SECTION("the ciphers differ") {
    if (skip_unavailable(CipherSuite::kAesGcm)) return;
    auto initiator =
        *NoiseHandshake::initiator(suite, bytes_of(prologue), client, server.public_key());
    auto responder = *NoiseHandshake::responder(CipherSuite::kAesGcm, bytes_of(prologue), server);
    REQUIRE(initiator.write_message({}, first).ok());
    CHECK(responder.read_message(bytes_of(first), payload).code() ==
          absl::StatusCode::kUnauthenticated);
  }
  SECTION("message 1 comes back to its sender") {
    auto initiator =
        *NoiseHandshake::initiator(suite, bytes_of(prologue), client, server.public_key());
    REQUIRE(initiator.write_message({}, first).ok());
    CHECK(initiator.read_message(bytes_of(first), payload).code() ==
          absl::StatusCode::kUnauthenticated);
  }
  CHECK(payload == payload_before);
}

TEST_CASE("messages out of turn are refused") {
  Ends ends(CipherSuite::kChaChaPoly);
  std::string out;
  CHECK(ends.responder.write_message({}, out).code() == absl::StatusCode::kFailedPrecondition);
  CHECK(ends.initiator.read_message({}, out).code() == absl::StatusCode::kFailedPrecondition);
  CHECK(ends.initiator.split().status().code() == absl::StatusCode::kFailedPrecondition);
  REQUIRE(ends.initiator.write_message({}, out).ok());
  CHECK(ends.initiator.write_message({}, out).code() == absl::StatusCode::kFailedPrecondition);
}

TEST_CASE("public keys of low order are refused") {
  // The points whose order divides 8, and their non-canonical forms; RFC 7748, section 7, and
  // https://cr.yp.to/ecdh.html#validate.
  const char* kLowOrder[] = {
      "0000000000000000000000000000000000000000000000000000000000000000",
      "0100000000000000000000000000000000000000000000000000000000000000",
      "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
      "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
      "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
      "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
      "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
  };
  for (const char* hex : kLowOrder) {
    CAPTURE(hex);
    const PublicKey point = public_of(hex);
    const Identity self = Identity::generate();
    std::string out;
    // As the pinned server key.
    auto initiator = *NoiseHandshake::initiator(CipherSuite::kChaChaPoly, {}, self, point);
    CHECK(initiator.write_message({}, out).code() == absl::StatusCode::kUnauthenticated);
    CHECK(out.empty());
    // As the ephemeral key in message 1 and in message 2.
    auto responder = *NoiseHandshake::responder(CipherSuite::kChaChaPoly, {}, self);
    std::string message = unhex(hex) + std::string(64, 'x');
    CHECK(responder.read_message(bytes_of(message), out).code() ==
          absl::StatusCode::kUnauthenticated);
    Ends ends(CipherSuite::kChaChaPoly);
    std::string first;
    REQUIRE(ends.initiator.write_message({}, first).ok());
    message = unhex(hex) + std::string(16, 'x');
    CHECK(ends.initiator.read_message(bytes_of(message), out).code() ==
          absl::StatusCode::kUnauthenticated);
    CHECK(out.empty());
  }
}

TEST_CASE("the last nonce is used once and the reserved one never") {
  for (CipherSuite suite : kSuites) {
    if (skip_unavailable(suite)) continue;
    Channel channel = connect(suite);
    const std::uint64_t last = std::numeric_limits<std::uint64_t>::max() - 1;
    channel.client.send.set_nonce(last);
    channel.server.receive.set_nonce(last);
    std::string out;
    REQUIRE(
        channel.server.receive.decrypt({}, bytes_of(seal(channel.client.send, "last")), out).ok());
    CHECK(out == "last");
    CHECK(channel.client.send.encrypt({}, bytes_of("x"), out).code() ==
          absl::StatusCode::kResourceExhausted);
    CHECK(channel.server.receive.decrypt({}, bytes_of(std::string(17, 'x')), out).code() ==
          absl::StatusCode::kResourceExhausted);
    CHECK(out == "last");
  }
}

TEST_CASE("a moved-from secret and cipher state hold no key") {
  SecretBytes<32> secret;
  randombytes_buf(secret.data(), secret.size());
  const SecretBytes<32> kept = secret.copy();
  SecretBytes<32> moved = std::move(secret);
  CHECK(std::memcmp(moved.data(), kept.data(), 32) == 0);
  CHECK(sodium_is_zero(secret.data(), 32) == 1);

  CipherState state(CipherSuite::kChaChaPoly, std::move(moved));
  CipherState target = std::move(state);
  std::string out;
  CHECK(target.encrypt({}, {}, out).ok());
  CHECK(state.encrypt({}, {}, out).code() == absl::StatusCode::kFailedPrecondition);
}

}  // namespace infemeral
