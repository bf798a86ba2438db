// Who an end of the channel is: an X25519 key pair in a file, and the public keys that it trusts.
//
// Both kinds of key are one line of text, 32 bytes in URL-safe base64 without padding, after a word
// that tells them apart:
//
//   infemeral-public:7qPk0Z0c0k8u1nB2Gf4M0VQ4O0mB1n8zq1yCw3m9s2E
//   infemeral-secret:...                    (a file of its own, mode 0600)
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "net/secret.h"

namespace infemeral {

using PublicKey = std::array<std::uint8_t, 32>;
using SecretKey = SecretBytes<32>;

// Movable only; the secret half is wiped with the object.
class Identity {
 public:
  // A fresh key pair from the system's random source.
  static Identity generate();
  static Identity from_secret(SecretKey secret);

  // Reads a secret key file. NotFound; PermissionDenied when group or others have any access to the
  // file; InvalidArgument when it holds a public key or something else.
  static absl::StatusOr<Identity> load(const std::string& path);

  // Writes a new file with mode 0600. AlreadyExists rather than overwriting a key.
  absl::Status save(const std::string& path) const;

  const PublicKey& public_key() const { return public_key_; }
  const SecretKey& secret_key() const { return secret_key_; }

 private:
  explicit Identity(SecretKey secret);

  SecretKey secret_key_;
  PublicKey public_key_{};
};

std::string format_public_key(const PublicKey& key);

// Surrounding white space is allowed. InvalidArgument otherwise; the message never repeats the
// text, which may be a secret key given by mistake.
absl::StatusOr<PublicKey> parse_public_key(std::string_view text);

// One key a line; empty lines and lines that start with '#' are skipped; words after the key name
// its owner and are not read. A file without any key is InvalidArgument.
absl::StatusOr<std::vector<PublicKey>> load_public_keys(const std::string& path);

// What a user gave: a key itself, or the path of such a list. The errors of both.
absl::StatusOr<std::vector<PublicKey>> read_public_keys(const std::string& text_or_path);

// Whether the list holds the key, in a time that depends on the length of the list alone.
bool contains_key(const std::vector<PublicKey>& keys, const PublicKey& key);

}  // namespace infemeral
