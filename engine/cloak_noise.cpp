#include "engine/cloak_noise.h"

#include <sodium.h>

#include <cmath>
#include <exception>
#include <numbers>

#include "engine/sampling.h"

namespace infemeral {

std::uint64_t random_noise_key() {
  if (sodium_init() < 0) std::terminate();
  std::uint64_t key;
  randombytes_buf(&key, sizeof key);
  return key;
}

void CloakNoise::add(std::span<float> row) {
  if (level_ == 0) return;
  double squares = 0;
  for (float x : row) squares += static_cast<double>(x) * x;
  const double scale = level_ * std::sqrt(squares / static_cast<double>(row.size()));
  for (std::size_t j = 0; j < row.size(); j += 4) {
    const PhiloxWords words = philox4x32(key_, rows_, j / 4);
    for (std::size_t pair = 0; pair < 2; ++pair) {  // Box and Muller, as cuRAND does
      const double u = (words.word[2 * pair] + 0.5) * 0x1p-32;
      const double angle = 2 * std::numbers::pi * (words.word[2 * pair + 1] + 0.5) * 0x1p-32;
      const double radius = scale * std::sqrt(-2 * std::log(u));
      const std::size_t at = j + 2 * pair;
      if (at < row.size()) row[at] += static_cast<float>(radius * std::sin(angle));
      if (at + 1 < row.size()) row[at + 1] += static_cast<float>(radius * std::cos(angle));
    }
  }
  ++rows_;
}

}  // namespace infemeral
