// Random numbers for tests: other ones in every run, and the same again with INFEMERAL_TEST_SEED.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <random>
#include <type_traits>
#include <vector>

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
template <typename T = float>
std::vector<T> normals(std::size_t n, std::type_identity_t<T> scale = 1) {
  std::normal_distribution<T> distribution(0, scale);
  std::vector<T> values(n);
  for (T& value : values) value = distribution(rng());
  return values;
}
inline float uniform(float low, float high) {
  return std::uniform_real_distribution<float>(low, high)(rng());
}

}  // namespace infemeral
