// The cloak: a secret orthogonal matrix Q that rotates hidden states before they leave the client.
//
// seed -> ChaCha20 keystream under a subkey -> Gaussians in double (Box-Muller), column by column
// -> Householder QR, columns of Q times the signs of R's diagonal, which makes Q Haar-distributed
// (Mezzadri, Notices of the AMS 54, 2007) -> rounded to float16. Two machines may round a few
// entries to neighbouring float16 values; that is far below the matrix's own rounding. It is
// obfuscation, not cryptography: docs/threat-model.md says what it hides.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/link.h"

namespace infemeral {

// PermissionDenied when group or others can read the file, InvalidArgument when it is no regular
// one.
absl::Status check_private_file(const std::filesystem::path& file);

// 32 secret bytes; wiped when destroyed. Movable only.
class CloakSeed {
 public:
  static CloakSeed random();
  static CloakSeed from_bytes(std::span<const std::uint8_t, 32> bytes);
  // A key file: 32 raw bytes, mode 0600. PermissionDenied when group or others can read it.
  static absl::StatusOr<CloakSeed> load(const std::filesystem::path& file);
  // Creates the file with mode 0600; refuses to overwrite.
  absl::Status save(const std::filesystem::path& file) const;

  CloakSeed(CloakSeed&& other) noexcept;
  CloakSeed& operator=(CloakSeed&& other) noexcept;
  ~CloakSeed();

  std::span<const std::uint8_t, 32> bytes() const { return bytes_; }
  // BLAKE2b-256 of the seed under the key "infemeral cloak commitment v1": what the body's folder
  // may know, and what Open compares.
  Fingerprint commitment() const;

 private:
  CloakSeed() = default;
  std::array<std::uint8_t, 32> bytes_{};
};

// Q in float16, row-major H x H; wiped when destroyed. Immutable; readable from any thread.
class Cloak {
 public:
  // Makes Q from the seed: O(H^3), seconds at H = 4096. Internal when max|QQ^T - I| >= 1e-3, which
  // is checked here for every matrix that is made.
  static absl::StatusOr<Cloak> generate(const CloakSeed& seed, std::size_t hidden_size);
  // The matrix file of eager mode (tensor "cloak", metadata with the commitment).
  // PermissionDenied when group or others can read it; FailedPrecondition when it belongs to
  // another seed or size; DataLoss when it is not orthogonal (a sample of rows is checked).
  static absl::StatusOr<Cloak> load(const std::filesystem::path& file, const CloakSeed& seed,
                                    std::size_t hidden_size);
  // Creates the file with mode 0600: the matrix is as secret as the seed.
  absl::Status save(const std::filesystem::path& file, const CloakSeed& seed) const;

  Cloak(Cloak&& other) noexcept = default;
  Cloak& operator=(Cloak&& other) noexcept;
  ~Cloak();

  std::size_t hidden_size() const { return hidden_size_; }
  std::span<const std::uint16_t> values() const { return values_; }  // binary16, H * H
  // max |QQ^T - I| over all entries, in float64.
  double orthogonality_error() const;

 private:
  Cloak() = default;
  std::size_t hidden_size_ = 0;
  std::vector<std::uint16_t> values_;
};

// The matrix whose orthogonal factor Cloak::generate takes: n * n independent standard Gaussians
// from the seed, column by column. For devices that factor it themselves; wipe it after use.
void cloak_gaussians(const CloakSeed& seed, std::span<double> out);

}  // namespace infemeral
