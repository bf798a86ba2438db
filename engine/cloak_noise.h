// Noise on cloaked rows, for those who ask for it: x_j + level * rms(x) * g_j with independent
// standard Gaussians g_j, new ones for every row. It costs accuracy, and docs/threat-model.md says
// how little it hides. Off by default.
#pragma once

#include <cstdint>
#include <span>

namespace infemeral {

inline constexpr float kMaxCloakNoise = 1;

// A key for Philox from the system's random numbers. The noise is to be unpredictable, not
// repeatable: sampling with the same seed then gives other tokens.
std::uint64_t random_noise_key();

// One a backend; not thread-safe.
class CloakNoise {
 public:
  explicit CloakNoise(float level) : level_(level), key_(random_noise_key()) {}
  bool on() const { return level_ > 0; }
  void add(std::span<float> row);

 private:
  float level_;
  std::uint64_t key_;
  std::uint64_t rows_ = 0;  // so far: the counter that makes every row's numbers new
};

}  // namespace infemeral
