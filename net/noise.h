// Noise_IK_25519_{AESGCM,ChaChaPoly}_SHA256 (The Noise Protocol Framework, revision 34), without
// I/O.
//
//   <- s                    the initiator knows the responder's static key
//   ...
//   -> e, es, s, ss         message 1, 96 bytes with an empty payload
//   <- e, ee, se            message 2, 48 bytes with an empty payload
//
// After message 2 both ends have authenticated each other and hold one CipherState for each
// direction. The primitives are libsodium's and, for AES-GCM, OpenSSL's; this file is the order in
// which they are called.
//
// A failed read poisons its object: every later call is refused, so that nothing can be probed
// twice. Objects are used by one thread at a time. Keys are wiped with the object.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "net/aes_gcm.h"
#include "net/identity.h"
#include "net/secret.h"

namespace infemeral {

// Numbers go over the wire: do not renumber.
enum class CipherSuite : std::uint8_t {
  kAesGcm = 1,      // Noise_IK_25519_AESGCM_SHA256: needs AES-NI and PCLMUL on both ends
  kChaChaPoly = 2,  // Noise_IK_25519_ChaChaPoly_SHA256: everywhere
};

std::string cipher_suite_name(CipherSuite suite);  // the Noise protocol name
std::optional<CipherSuite> cipher_suite_from_number(std::uint32_t number);
bool cipher_suite_available(CipherSuite suite);  // on this processor

inline constexpr std::size_t kNoiseMaxMessage = 65535;
inline constexpr std::size_t kNoiseTagSize = 16;
inline constexpr std::size_t kNoiseMaxPayload = kNoiseMaxMessage - kNoiseTagSize;  // transport
inline constexpr std::size_t kNoiseMessage1Size = 96;  // with an empty payload
inline constexpr std::size_t kNoiseMessage2Size = 48;

// How long a sender keeps a key: the record that reaches either limit is the last one under it.
// 64 GiB are 2^32 blocks of AES, with which an attacker's advantage over GCM is about 2^-64.
struct RekeyLimits {
  std::uint64_t bytes = std::uint64_t{64} << 30;  // of plaintext
  std::chrono::steady_clock::duration age = std::chrono::hours(1);
};

// A key and a counter: one direction of the channel. Needs an available suite.
class CipherState {
 public:
  CipherState(CipherSuite suite, SecretBytes<32> key);
  CipherState(CipherState&&) noexcept;
  CipherState& operator=(CipherState&&) noexcept;

  // Appends the ciphertext and its tag to `out`. `associated` is empty except in the handshake.
  // InvalidArgument beyond kNoiseMaxPayload bytes; ResourceExhausted when all 2^64 - 1 nonces are
  // used.
  absl::Status encrypt(std::span<const std::byte> associated, std::span<const std::byte> plaintext,
                       std::string& out);
  // Appends the plaintext to `out`; on an error `out` is as before. DataLoss for anything that is
  // not the next message of this direction.
  absl::Status decrypt(std::span<const std::byte> associated, std::span<const std::byte> message,
                       std::string& out);

  // Noise's Rekey (4.2, 11.3): the next key, from which nobody can compute this one, takes its
  // place. The counter goes on. For both ends of a direction between the same two messages.
  void rekey();

  std::uint64_t nonce() const { return nonce_; }
  // Noise's SetNonce; the product never calls it, the tests reach the last nonce with it.
  void set_nonce(std::uint64_t nonce) { nonce_ = nonce; }

 private:
  absl::Status check_usable() const;
  // Writes the ciphertext and its tag; false when the cipher refuses to.
  bool encrypt_with(std::uint64_t nonce, std::span<const std::byte> associated,
                    std::span<const std::byte> plaintext, unsigned char* target) const;

  CipherSuite suite_;
  bool poisoned_ = false;
  std::uint64_t nonce_ = 0;
  SecretBytes<32> key_;
  AesGcm aes_;  // the expanded key; without one for ChaChaPoly
};

// What a finished handshake leaves.
struct NoiseTransport {
  CipherState send;
  CipherState receive;
  PublicKey remote_static{};
  std::array<std::uint8_t, 32> handshake_hash{};  // the same at both ends; binds the channel
};

class NoiseHandshake {
 public:
  // `ephemeral` replaces the fresh key pair; only the public test vectors need it.
  static absl::StatusOr<NoiseHandshake> initiator(
      CipherSuite suite, std::span<const std::byte> prologue, const Identity& self,
      const PublicKey& responder, std::optional<SecretKey> ephemeral = std::nullopt);
  static absl::StatusOr<NoiseHandshake> responder(
      CipherSuite suite, std::span<const std::byte> prologue, const Identity& self,
      std::optional<SecretKey> ephemeral = std::nullopt);

  // Appends this end's message to `out`. FailedPrecondition when it is not this end's turn.
  absl::Status write_message(std::span<const std::byte> payload, std::string& out);
  // Appends the payload of the other end's message to `out`. Unauthenticated when the message was
  // not made for this end or was damaged.
  absl::Status read_message(std::span<const std::byte> message, std::string& payload);

  // The responder knows it after message 1. It is proven only by the first transport message: a
  // replayed message 1 carries it too.
  const PublicKey& remote_static() const { return remote_static_; }
  bool finished() const { return step_ == 2; }

  // Once, after finished(). The handshake object is spent.
  absl::StatusOr<NoiseTransport> split();

 private:
  NoiseHandshake(CipherSuite suite, bool initiator, const Identity& self,
                 const PublicKey& responder, std::span<const std::byte> prologue,
                 std::optional<SecretKey> ephemeral);

  absl::Status write_tokens(std::span<const std::byte> payload, std::string& out);
  absl::Status read_tokens(std::span<const std::byte> message, std::string& payload);
  void mix_hash(std::span<const std::byte> data);
  absl::Status mix_dh(const SecretKey& ours, const PublicKey& theirs);
  absl::Status encrypt_and_hash(std::span<const std::byte> plaintext, std::string& out);
  absl::Status decrypt_and_hash(std::span<const std::byte> ciphertext, std::string& out);

  CipherSuite suite_;
  bool initiator_;
  bool poisoned_ = false;
  int step_ = 0;  // messages done; 3 after split()
  SecretKey secret_;
  PublicKey public_;
  SecretKey ephemeral_secret_;
  PublicKey ephemeral_public_{};
  PublicKey remote_static_{};
  PublicKey remote_ephemeral_{};
  SecretBytes<32> chaining_key_;
  std::array<std::uint8_t, 32> hash_{};
  std::optional<CipherState> cipher_;
};

}  // namespace infemeral
