// Random numbers for tests: other ones in every run, and the same again with INFEMERAL_TEST_SEED.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <random>

namespace infemeral {

inline std::mt19937_64& rng() {
  static std::mt19937_64 generator{std::random_device{}()};
  return generator;
}

// At the beginning of a test, which captures the result:
//
//   const std::uint64_t seed = reseed();
//   CAPTURE(seed);
inline std::uint64_t reseed() {
  const char* given = std::getenv("INFEMERAL_TEST_SEED");
  const std::uint64_t seed =
      given != nullptr ? std::strtoull(given, nullptr, 10) : std::random_device{}();
  rng().seed(seed);
  return seed;
}

inline std::size_t random_index(std::size_t n) {
  return rng()() % n;
}
inline float normal(float scale = 1) {
  return std::normal_distribution<float>(0, scale)(rng());
}
inline float uniform(float low, float high) {
  return std::uniform_real_distribution<float>(low, high)(rng());
}

}  // namespace infemeral
