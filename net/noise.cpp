#include "net/noise.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"

namespace infemeral {
namespace {

using Bytes = std::span<const std::byte>;
using Hash = std::array<std::uint8_t, 32>;

static_assert(crypto_aead_chacha20poly1305_ietf_ABYTES == kNoiseTagSize);
static_assert(crypto_scalarmult_BYTES == 32 && crypto_hash_sha256_BYTES == 32);

constexpr std::size_t kKeySize = 32;

// The nonce 2^64 - 1 is reserved by the specification (5.1).
constexpr std::uint64_t kReservedNonce = std::numeric_limits<std::uint64_t>::max();

// Chooses libsodium's implementations for this processor; the answer about AES is wrong before it.
bool sodium_ready() {
  static const bool ready = sodium_init() >= 0;
  return ready;
}

const unsigned char* raw(Bytes bytes) {
  return reinterpret_cast<const unsigned char*>(bytes.data());
}

template <std::size_t N>
Bytes as_bytes(const std::array<std::uint8_t, N>& array) {
  return std::as_bytes(std::span<const std::uint8_t>(array));
}

Bytes tail_bytes(const std::string& text, std::size_t begin) {
  return std::as_bytes(std::span<const char>(text).subspan(begin));
}

// HMAC-SHA256(key, data || suffix).
SecretBytes<32> hmac(const SecretBytes<32>& key, Bytes data, Bytes suffix = {}) {
  crypto_auth_hmacsha256_state state;
  crypto_auth_hmacsha256_init(&state, key.data(), SecretBytes<32>::size());
  crypto_auth_hmacsha256_update(&state, raw(data), data.size());
  crypto_auth_hmacsha256_update(&state, raw(suffix), suffix.size());
  SecretBytes<32> out;
  crypto_auth_hmacsha256_final(&state, out.data());
  sodium_memzero(&state, sizeof state);
  return out;
}

// HKDF with two outputs, as the specification defines it (4.3).
std::pair<SecretBytes<32>, SecretBytes<32>> hkdf(const SecretBytes<32>& chaining_key, Bytes input) {
  static constexpr std::byte kOne[] = {std::byte{1}};
  static constexpr std::byte kTwo[] = {std::byte{2}};
  const SecretBytes<32> temp = hmac(chaining_key, input);
  SecretBytes<32> first = hmac(temp, kOne);
  const Bytes first_bytes(reinterpret_cast<const std::byte*>(first.data()), first.size());
  SecretBytes<32> second = hmac(temp, first_bytes, kTwo);
  return {std::move(first), std::move(second)};
}

// 96-bit nonces: 32 zero bits, then the counter, big-endian for AESGCM and little-endian for
// ChaChaPoly (12.3, 12.4).
std::array<unsigned char, 12> nonce_bytes(CipherSuite suite, std::uint64_t counter) {
  std::array<unsigned char, 12> nonce{};
  for (std::size_t i = 0; i < 8; ++i) {
    const std::size_t shift = suite == CipherSuite::kAesGcm ? 56 - 8 * i : 8 * i;
    nonce[4 + i] = static_cast<unsigned char>(counter >> shift);
  }
  return nonce;
}

PublicKey public_of(const SecretKey& secret) {
  PublicKey key;
  crypto_scalarmult_base(key.data(), secret.data());
  return key;
}

}  // namespace

std::string cipher_suite_name(CipherSuite suite) {
  return suite == CipherSuite::kAesGcm ? "Noise_IK_25519_AESGCM_SHA256"
                                       : "Noise_IK_25519_ChaChaPoly_SHA256";
}

std::optional<CipherSuite> cipher_suite_from_number(std::uint32_t number) {
  if (number < 1 || number > 2) return std::nullopt;
  return static_cast<CipherSuite>(number);
}

bool cipher_suite_available(CipherSuite suite) {
  if (!sodium_ready()) return false;
  return suite == CipherSuite::kChaChaPoly || crypto_aead_aes256gcm_is_available() == 1;
}

CipherState::CipherState(CipherSuite suite, SecretBytes<32> key)
    : suite_(suite), key_(std::move(key)) {
  if (suite_ == CipherSuite::kAesGcm) aes_ = AesGcm(key_);
}

CipherState::CipherState(CipherState&& other) noexcept {
  *this = std::move(other);
}

CipherState& CipherState::operator=(CipherState&& other) noexcept {
  if (this == &other) return *this;
  suite_ = other.suite_;
  poisoned_ = std::exchange(other.poisoned_, true);
  nonce_ = other.nonce_;
  key_ = std::move(other.key_);
  aes_ = std::move(other.aes_);
  return *this;
}

absl::Status CipherState::check_usable() const {
  if (poisoned_) {
    return absl::FailedPreconditionError("the encrypted channel was given up after an error");
  }
  if (nonce_ == kReservedNonce) {
    return absl::ResourceExhaustedError("the encrypted channel has used all its nonces; reconnect");
  }
  return absl::OkStatus();
}

bool CipherState::encrypt_with(std::uint64_t nonce, Bytes associated, Bytes plaintext,
                               unsigned char* target) const {
  const auto bytes = nonce_bytes(suite_, nonce);
  if (suite_ == CipherSuite::kAesGcm) return aes_.encrypt(bytes, associated, plaintext, target);
  crypto_aead_chacha20poly1305_ietf_encrypt(target, nullptr, raw(plaintext), plaintext.size(),
                                            raw(associated), associated.size(), nullptr,
                                            bytes.data(), key_.data());
  return true;
}

absl::Status CipherState::encrypt(Bytes associated, Bytes plaintext, std::string& out) {
  if (absl::Status status = check_usable(); !status.ok()) return status;
  if (plaintext.size() > kNoiseMaxPayload) {
    return absl::InvalidArgumentError(absl::StrCat(
        "a Noise message carries at most ", kNoiseMaxPayload, " bytes, not ", plaintext.size()));
  }
  const std::size_t begin = out.size();
  out.resize(begin + plaintext.size() + kNoiseTagSize);
  if (!encrypt_with(nonce_++, associated, plaintext,
                    reinterpret_cast<unsigned char*>(out.data() + begin))) {
    out.resize(begin);
    poisoned_ = true;
    return absl::InternalError("OpenSSL cannot encrypt");
  }
  return absl::OkStatus();
}

absl::Status CipherState::decrypt(Bytes associated, Bytes message, std::string& out) {
  if (absl::Status status = check_usable(); !status.ok()) return status;
  const std::size_t begin = out.size();
  bool genuine = false;
  if (message.size() >= kNoiseTagSize && message.size() <= kNoiseMaxMessage) {
    out.resize(begin + message.size() - kNoiseTagSize);
    auto* target = reinterpret_cast<unsigned char*>(out.data() + begin);
    const auto nonce = nonce_bytes(suite_, nonce_);
    if (suite_ == CipherSuite::kAesGcm) {
      genuine = aes_.decrypt(nonce, associated, message, target);
    } else {
      genuine = crypto_aead_chacha20poly1305_ietf_decrypt(
                    target, nullptr, nullptr, raw(message), message.size(), raw(associated),
                    associated.size(), nonce.data(), key_.data()) == 0;
    }
  }
  if (!genuine) {
    out.resize(begin);
    poisoned_ = true;
    return absl::DataLossError(
        "a message of the encrypted channel is damaged, repeated or out of order");
  }
  ++nonce_;
  return absl::OkStatus();
}

void CipherState::rekey() {
  // REKEY: what 32 zeros become under the reserved nonce, without their tag.
  static constexpr std::array<std::byte, kKeySize> kZeros{};
  SecretBytes<kKeySize + kNoiseTagSize> sealed;
  if (poisoned_ || !encrypt_with(kReservedNonce, {}, kZeros, sealed.data())) {
    poisoned_ = true;
    return;
  }
  std::memcpy(key_.data(), sealed.data(), kKeySize);
  if (suite_ == CipherSuite::kAesGcm) aes_ = AesGcm(key_);
}

NoiseHandshake::NoiseHandshake(CipherSuite suite, bool initiator, const Identity& self,
                               const PublicKey& responder, Bytes prologue,
                               std::optional<SecretKey> ephemeral)
    : suite_(suite),
      initiator_(initiator),
      secret_(self.secret_key().copy()),
      public_(self.public_key()) {
  if (ephemeral) {
    ephemeral_secret_ = std::move(*ephemeral);
  } else {
    randombytes_buf(ephemeral_secret_.data(), SecretKey::size());
  }
  ephemeral_public_ = public_of(ephemeral_secret_);
  if (initiator_) remote_static_ = responder;

  // InitializeSymmetric: a protocol name of at most 32 bytes is padded with zeros, not hashed.
  const std::string name = cipher_suite_name(suite);
  std::copy(name.begin(), name.end(), hash_.begin());
  std::copy(hash_.begin(), hash_.end(), chaining_key_.data());
  mix_hash(prologue);
  mix_hash(as_bytes(responder));  // the pre-message: <- s
}

absl::StatusOr<NoiseHandshake> NoiseHandshake::initiator(CipherSuite suite, Bytes prologue,
                                                         const Identity& self,
                                                         const PublicKey& responder,
                                                         std::optional<SecretKey> ephemeral) {
  if (!cipher_suite_available(suite)) {
    return absl::UnimplementedError(
        absl::StrCat("this processor has no instructions for ", cipher_suite_name(suite)));
  }
  return NoiseHandshake(suite, true, self, responder, prologue, std::move(ephemeral));
}

absl::StatusOr<NoiseHandshake> NoiseHandshake::responder(CipherSuite suite, Bytes prologue,
                                                         const Identity& self,
                                                         std::optional<SecretKey> ephemeral) {
  if (!cipher_suite_available(suite)) {
    return absl::UnimplementedError(
        absl::StrCat("this processor has no instructions for ", cipher_suite_name(suite)));
  }
  return NoiseHandshake(suite, false, self, self.public_key(), prologue, std::move(ephemeral));
}

void NoiseHandshake::mix_hash(Bytes data) {
  crypto_hash_sha256_state state;
  crypto_hash_sha256_init(&state);
  crypto_hash_sha256_update(&state, hash_.data(), hash_.size());
  crypto_hash_sha256_update(&state, raw(data), data.size());
  crypto_hash_sha256_final(&state, hash_.data());
}

absl::Status NoiseHandshake::mix_dh(const SecretKey& ours, const PublicKey& theirs) {
  SecretBytes<32> shared;
  // Fails for points of low order, whose shared secret would be zero and known to everybody.
  if (crypto_scalarmult(shared.data(), ours.data(), theirs.data()) != 0) {
    return absl::UnauthenticatedError("the other end sent a public key that is no valid key");
  }
  auto [chaining_key, key] =
      hkdf(chaining_key_, Bytes(reinterpret_cast<const std::byte*>(shared.data()), kKeySize));
  chaining_key_ = std::move(chaining_key);
  cipher_.emplace(suite_, std::move(key));
  return absl::OkStatus();
}

absl::Status NoiseHandshake::encrypt_and_hash(Bytes plaintext, std::string& out) {
  const std::size_t begin = out.size();
  const Hash associated = hash_;
  absl::Status status = cipher_->encrypt(as_bytes(associated), plaintext, out);
  if (status.ok()) mix_hash(tail_bytes(out, begin));
  return status;
}

absl::Status NoiseHandshake::decrypt_and_hash(Bytes ciphertext, std::string& out) {
  absl::Status status = cipher_->decrypt(as_bytes(hash_), ciphertext, out);
  if (!status.ok()) {
    return absl::UnauthenticatedError("the handshake message was not made for this key");
  }
  mix_hash(ciphertext);
  return absl::OkStatus();
}

absl::Status NoiseHandshake::write_tokens(Bytes payload, std::string& out) {
  out.append(reinterpret_cast<const char*>(ephemeral_public_.data()), kKeySize);  // e
  mix_hash(as_bytes(ephemeral_public_));
  absl::Status status;
  if (initiator_) {
    status = mix_dh(ephemeral_secret_, remote_static_);                  // es
    if (status.ok()) status = encrypt_and_hash(as_bytes(public_), out);  // s
    if (status.ok()) status = mix_dh(secret_, remote_static_);           // ss
  } else {
    status = mix_dh(ephemeral_secret_, remote_ephemeral_);                // ee
    if (status.ok()) status = mix_dh(ephemeral_secret_, remote_static_);  // se
  }
  return status.ok() ? encrypt_and_hash(payload, out) : status;
}

absl::Status NoiseHandshake::read_tokens(Bytes message, std::string& payload) {
  const std::size_t fixed = kNoiseTagSize + (initiator_ ? kKeySize : 2 * kKeySize + kNoiseTagSize);
  if (message.size() < fixed || message.size() > kNoiseMaxMessage) {
    return absl::UnauthenticatedError(
        absl::StrCat("a handshake message cannot have ", message.size(), " bytes"));
  }
  std::memcpy(remote_ephemeral_.data(), message.data(), kKeySize);  // e
  mix_hash(message.first(kKeySize));
  message = message.subspan(kKeySize);
  absl::Status status;
  if (initiator_) {
    status = mix_dh(ephemeral_secret_, remote_ephemeral_);         // ee
    if (status.ok()) status = mix_dh(secret_, remote_ephemeral_);  // se
  } else {
    status = mix_dh(secret_, remote_ephemeral_);  // es
    std::string remote;
    if (status.ok()) status = decrypt_and_hash(message.first(kKeySize + kNoiseTagSize), remote);
    if (!status.ok()) return status;
    std::memcpy(remote_static_.data(), remote.data(), kKeySize);  // s
    message = message.subspan(kKeySize + kNoiseTagSize);
    status = mix_dh(secret_, remote_static_);  // ss
  }
  return status.ok() ? decrypt_and_hash(message, payload) : status;
}

absl::Status NoiseHandshake::write_message(Bytes payload, std::string& out) {
  // The initiator writes message 0 and reads message 1.
  if (poisoned_ || step_ != (initiator_ ? 0 : 1)) {
    return absl::FailedPreconditionError("the handshake does not expect to write a message here");
  }
  const std::size_t fixed = kNoiseTagSize + (initiator_ ? 2 * kKeySize + kNoiseTagSize : kKeySize);
  if (payload.size() > kNoiseMaxMessage - fixed) {
    return absl::InvalidArgumentError(absl::StrCat("this handshake message carries at most ",
                                                   kNoiseMaxMessage - fixed, " bytes, not ",
                                                   payload.size()));
  }
  const std::size_t begin = out.size();
  absl::Status status = write_tokens(payload, out);
  if (status.ok()) {
    ++step_;
  } else {
    out.resize(begin);
    poisoned_ = true;
  }
  return status;
}

absl::Status NoiseHandshake::read_message(Bytes message, std::string& payload) {
  if (poisoned_ || step_ != (initiator_ ? 1 : 0)) {
    return absl::FailedPreconditionError("the handshake does not expect to read a message here");
  }
  absl::Status status = read_tokens(message, payload);
  if (status.ok()) {
    ++step_;
  } else {
    poisoned_ = true;
  }
  return status;
}

absl::StatusOr<NoiseTransport> NoiseHandshake::split() {
  if (!finished() || poisoned_) {
    return absl::FailedPreconditionError("the handshake is not finished");
  }
  auto [send, receive] = hkdf(chaining_key_, {});  // as the initiator sees them
  chaining_key_.wipe();
  secret_.wipe();
  ephemeral_secret_.wipe();
  cipher_.reset();
  step_ = 3;
  if (!initiator_) std::swap(send, receive);
  return NoiseTransport{CipherState(suite_, std::move(send)),
                        CipherState(suite_, std::move(receive)), remote_static_, hash_};
}

}  // namespace infemeral
