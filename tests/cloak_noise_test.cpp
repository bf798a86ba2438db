// The optional noise on cloaked rows: its size, its shape, and that it is never the same twice.
#include "engine/cloak_noise.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <random>
#include <vector>

namespace infemeral {

TEST_CASE("noise is Gaussian, as large as asked for, and new for every row and every object") {
  std::mt19937_64 rng{std::random_device{}()};
  std::normal_distribution<float> normal(0, 3);
  const std::size_t n = 20001;  // not a multiple of four
  std::vector<float> row(n);
  for (float& x : row) x = normal(rng);
  double squares = 0;
  for (float x : row) squares += static_cast<double>(x) * x;
  const double rms = std::sqrt(squares / static_cast<double>(n));

  const double level = 0.25;
  CloakNoise noise(static_cast<float>(level)), other(static_cast<float>(level));
  std::vector<std::vector<double>> draws;
  for (CloakNoise* source : {&noise, &noise, &other}) {
    std::vector<float> noisy = row;
    source->add(noisy);
    std::vector<double> draw(n);
    for (std::size_t j = 0; j < n; ++j) draw[j] = (noisy[j] - row[j]) / (level * rms);
    draws.push_back(draw);
  }
  for (const std::vector<double>& draw : draws) {
    double sum = 0, sum2 = 0, sum4 = 0;
    for (double g : draw) sum += g, sum2 += g * g, sum4 += g * g * g * g;
    const auto count = static_cast<double>(n);
    // Six standard deviations of each mean: 1, sqrt(2) and sqrt(96) over sqrt(n).
    CHECK(std::fabs(sum / count) < 6 / std::sqrt(count));
    CHECK(std::fabs(sum2 / count - 1) < 6 * std::sqrt(2 / count));
    CHECK(std::fabs(sum4 / count - 3) < 6 * std::sqrt(96 / count));
  }
  for (std::size_t a = 0; a < draws.size(); ++a) {
    for (std::size_t b = 0; b < a; ++b) {
      double product = 0;
      for (std::size_t j = 0; j < n; ++j) product += draws[a][j] * draws[b][j];
      CHECK(std::fabs(product / static_cast<double>(n)) < 6 / std::sqrt(static_cast<double>(n)));
    }
  }
}

TEST_CASE("no level, no noise; a row of zeros stays one") {
  std::vector<float> row = {1, -2, 3}, zeros(5, 0.0f);
  CloakNoise off(0), on(1);
  off.add(row);
  on.add(zeros);
  CHECK(row == std::vector<float>{1, -2, 3});
  CHECK(zeros == std::vector<float>(5, 0.0f));
}

}  // namespace infemeral
