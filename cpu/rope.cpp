#include "cpu/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace infemeral {
namespace {

// Llama 3: wavelengths beyond the original context are stretched by `factor`, short ones kept, and
// those in between blended (transformers, _compute_llama3_parameters).
double llama3_frequency(double frequency, const RopeScaling& s) {
  const double wavelength = 2 * std::numbers::pi / frequency;
  const double context = s.original_max_position_embeddings;
  if (wavelength > context / s.low_freq_factor) return frequency / s.factor;
  if (wavelength < context / s.high_freq_factor) return frequency;
  const double smooth =
      (context / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor);
  return (1 - smooth) * frequency / s.factor + smooth * frequency;
}

}  // namespace

RopeTable::RopeTable(const ModelConfig& config) {
  const std::size_t half = config.head_dim / 2;
  for (std::size_t i = 0; i < half; ++i) {
    const double exponent = static_cast<double>(i) / static_cast<double>(half);
    const double frequency = std::pow(config.rope_theta, -exponent);
    frequencies_.push_back(
        config.rope_scaling.llama3 ? llama3_frequency(frequency, config.rope_scaling) : frequency);
  }
}

void RopeTable::extend(std::size_t count) {
  const std::size_t half = frequencies_.size();
  const std::size_t have = cosines_.size() / half;
  if (count <= have) return;
  count = std::max(count, have + have / 2 + 64);
  cosines_.reserve(count * half);
  sines_.reserve(count * half);
  for (std::size_t position = have; position < count; ++position) {
    for (double frequency : frequencies_) {
      const double angle = static_cast<double>(position) * frequency;
      cosines_.push_back(static_cast<float>(std::cos(angle)));
      sines_.push_back(static_cast<float>(std::sin(angle)));
    }
  }
}

void RopeTable::rotate(float* x, std::size_t heads, std::size_t position) const {
  const std::size_t half = frequencies_.size();
  const float* cosine = cosines_.data() + position * half;
  const float* sine = sines_.data() + position * half;
  for (std::size_t head = 0; head < heads; ++head, x += 2 * half) {
    float* a = x;
    float* b = x + half;
    for (std::size_t i = 0; i < half; ++i) {
      const float left = a[i], right = b[i];
      a[i] = left * cosine[i] - right * sine[i];
      b[i] = right * cosine[i] + left * sine[i];
    }
  }
}

}  // namespace infemeral
