#include "cpu/self_check.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "cpu/reference_block.h"

namespace infemeral {
namespace {

constexpr std::size_t kRows = 4;
constexpr double kSlack = 16;
constexpr double kMaxTolerance = 0.5;

double unit_roundoff(Dtype dtype) {
  switch (dtype) {
    case Dtype::kF16:
      return 0x1p-11;
    case Dtype::kBF16:
      return 0x1p-8;
    case Dtype::kI8:
      return 0x1p-7;  // half a step, of the 127 that a row's largest weight has, over a weight's
                      // size
    default:
      return 0x1p-24;
  }
}

double norm(std::span<const double> x) {
  double squares = 0;
  for (const double value : x) squares += value * value;
  return std::sqrt(squares);
}

std::vector<double> difference(std::span<const double> a, std::span<const double> b) {
  std::vector<double> result(a.begin(), a.end());
  for (std::size_t i = 0; i < result.size(); ++i) result[i] -= b[i];
  return result;
}

}  // namespace

absl::StatusOr<SelfCheck> self_check(const ModelConfig& config, const Safetensors& plain,
                                     const Safetensors& body, const Rotation& rotation,
                                     double orthogonality_error, Dtype body_dtype,
                                     std::size_t layer) {
  const auto plain_layer = find_layer(plain, config, layer);
  if (!plain_layer.ok()) return plain_layer.status();
  const auto body_layer = find_layer(body, config, layer);
  if (!body_layer.ok()) return body_layer.status();

  std::mt19937_64 rng(layer + 1);
  std::normal_distribution<double> normal;
  const double noise = unit_roundoff(body_dtype) + orthogonality_error;
  std::vector<double> x(kRows * config.hidden_size), disturbed(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) {
    x[i] = normal(rng);
    disturbed[i] = x[i] + noise * normal(rng);
  }

  const std::vector<double> added = difference(reference_block(config, *plain_layer, layer, x), x);
  const std::vector<double> added_disturbed =
      difference(reference_block(config, *plain_layer, layer, disturbed), disturbed);
  std::vector<double> rotated_x(x.size()), expected(x.size());
  rotation.rotate(kRows, x, rotated_x);
  rotation.rotate(kRows, added, expected);
  const std::vector<double> actual =
      difference(reference_block(config, *body_layer, layer, rotated_x), rotated_x);

  // Of a layer that adds nothing, as in a model that was made deeper, nothing must be added.
  const double scale = norm(added) > 0 ? norm(added) : norm(x);
  const double sensitivity = norm(difference(added_disturbed, added)) / scale;
  return SelfCheck{.error = norm(difference(actual, expected)) / scale,
                   .tolerance = std::min(kMaxTolerance, kSlack * (noise + sensitivity))};
}

}  // namespace infemeral
