#include "cpu/reference_block.h"

#include <oneapi/tbb/blocked_range.h>
#include <oneapi/tbb/parallel_for.h>

#include <algorithm>
#include <cmath>
#include <numbers>

#include "cpu/int8_weights.h"
#include "engine/text.h"

namespace infemeral {
namespace {

constexpr std::size_t kGrain = 16;  // rows of a matrix

std::vector<double> values_of(const TensorView& tensor) {
  std::vector<float> values(tensor.elements());
  tensor.read(0, values);
  return {values.begin(), values.end()};
}

// y = x W^T + b for every row of x.
std::vector<double> linear(const TensorView& weight, const TensorView& bias,
                           std::span<const double> x) {
  const std::size_t out = weight.shape[0], in = weight.shape[1], rows = x.size() / in;
  std::vector<double> y(rows * out);
  tbb::parallel_for(tbb::blocked_range<std::size_t>(0, out, kGrain), [&](const auto& range) {
    std::vector<float> w(in);
    for (std::size_t o = range.begin(); o != range.end(); ++o) {
      weight.read(o * in, w);
      for (std::size_t r = 0; r < rows; ++r) {
        double sum = bias.data.empty() ? 0 : bias.at(o);
        for (std::size_t i = 0; i < in; ++i) sum += x[r * in + i] * w[i];
        y[r * out + o] = sum;
      }
    }
  });
  return y;
}

// Rotates each head of each row by its position: element i with element i + d/2.
void apply_rope(const ModelConfig& config, std::size_t heads, std::span<double> x) {
  const std::size_t d = config.head_dim, half = d / 2;
  const std::vector<double> frequencies = reference_rope_frequencies(config);
  for (std::size_t vector = 0; vector < x.size() / d; ++vector) {
    double* v = x.data() + vector * d;
    const auto position = static_cast<double>(vector / heads);
    for (std::size_t i = 0; i < half; ++i) {
      const double c = std::cos(position * frequencies[i]), s = std::sin(position * frequencies[i]);
      const double a = v[i], b = v[i + half];
      v[i] = a * c - b * s;
      v[i + half] = b * c + a * s;
    }
  }
}

// Each row attends to itself and the rows before it, inside the layer's window. Returns the heads'
// outputs side by side.
std::vector<double> attend(const ModelConfig& config, std::size_t layer_index,
                           std::span<const double> q, std::span<const double> k,
                           std::span<const double> v) {
  const std::size_t d = config.head_dim, q_row = config.n_heads * d, kv_row = config.n_kv_heads * d;
  const std::size_t rows = q.size() / q_row, group = config.n_heads / config.n_kv_heads;
  const bool windowed = config.sliding_window > 0 && layer_index >= config.sliding_from_layer;
  std::vector<double> out(q.size(), 0);
  for (std::size_t row = 0; row < rows; ++row) {
    const std::size_t first =
        windowed && row + 1 > config.sliding_window ? row + 1 - config.sliding_window : 0;
    for (std::size_t head = 0; head < config.n_heads; ++head) {
      const double* qh = q.data() + row * q_row + head * d;
      const std::size_t kv_offset = head / group * d;
      std::vector<double> weights(row + 1, 0);
      double largest = -INFINITY, total = 0;
      for (std::size_t j = first; j <= row; ++j) {
        double score = 0;
        for (std::size_t i = 0; i < d; ++i) score += qh[i] * k[j * kv_row + kv_offset + i];
        weights[j] = score / std::sqrt(static_cast<double>(d));
        largest = std::max(largest, weights[j]);
      }
      for (std::size_t j = first; j <= row; ++j) {
        weights[j] = std::exp(weights[j] - largest);
        total += weights[j];
      }
      for (std::size_t j = first; j <= row; ++j) {
        for (std::size_t i = 0; i < d; ++i) {
          out[row * q_row + head * d + i] += weights[j] / total * v[j * kv_row + kv_offset + i];
        }
      }
    }
  }
  return out;
}

void add(std::span<const double> x, std::span<double> to) {
  for (std::size_t i = 0; i < to.size(); ++i) to[i] += x[i];
}

}  // namespace

std::string layer_prefix(std::size_t layer) {
  return cat("model.layers.", layer, ".");
}

absl::StatusOr<LayerTensors> find_layer(const Safetensors& weights, const ModelConfig& config,
                                        std::size_t layer) {
  const std::string prefix = layer_prefix(layer);
  const std::size_t hidden = config.hidden_size, inner = config.intermediate_size;
  const std::size_t q = config.n_heads * config.head_dim, kv = config.n_kv_heads * config.head_dim;
  LayerTensors t;
  struct Need {
    const char* name;
    TensorView* view;
    std::vector<std::size_t> shape;
    bool present = true;
  };
  const Need needs[] = {
      {"input_layernorm.weight", &t.input_gain, {hidden}},
      {"self_attn.q_proj.weight", &t.q, {q, hidden}},
      {"self_attn.k_proj.weight", &t.k, {kv, hidden}},
      {"self_attn.v_proj.weight", &t.v, {kv, hidden}},
      {"self_attn.o_proj.weight", &t.o, {hidden, q}},
      {"self_attn.q_proj.bias", &t.q_bias, {q}, config.qkv_bias},
      {"self_attn.k_proj.bias", &t.k_bias, {kv}, config.qkv_bias},
      {"self_attn.v_proj.bias", &t.v_bias, {kv}, config.qkv_bias},
      {"self_attn.o_proj.bias", &t.o_bias, {hidden}, config.o_bias},
      {"self_attn.q_norm.weight", &t.q_gain, {config.head_dim}, config.qk_norm},
      {"self_attn.k_norm.weight", &t.k_gain, {config.head_dim}, config.qk_norm},
      {"post_attention_layernorm.weight", &t.post_gain, {hidden}},
      {"mlp.gate_proj.weight", &t.gate, {inner, hidden}},
      {"mlp.up_proj.weight", &t.up, {inner, hidden}},
      {"mlp.down_proj.weight", &t.down, {hidden, inner}},
      {"mlp.gate_proj.bias", &t.gate_bias, {inner}, config.mlp_bias},
      {"mlp.up_proj.bias", &t.up_bias, {inner}, config.mlp_bias},
      {"mlp.down_proj.bias", &t.down_bias, {hidden}, config.mlp_bias},
  };
  for (const Need& need : needs) {
    if (!need.present) continue;
    auto view = need.shape.size() == 2 ? find_matrix(weights, prefix + need.name, need.shape)
                                       : weights.get(prefix + need.name, need.shape);
    if (!view.ok()) return view.status();
    *need.view = *std::move(view);
  }
  return t;
}

std::vector<double> reference_rms_norm(std::span<const double> rows, std::span<const double> gain,
                                       double eps) {
  const std::size_t n = gain.size();
  std::vector<double> out(rows.size());
  for (std::size_t begin = 0; begin < rows.size(); begin += n) {
    double squares = 0;
    for (std::size_t i = 0; i < n; ++i) squares += rows[begin + i] * rows[begin + i];
    const double scale = 1 / std::sqrt(squares / static_cast<double>(n) + eps);
    for (std::size_t i = 0; i < n; ++i) out[begin + i] = rows[begin + i] * scale * gain[i];
  }
  return out;
}

std::vector<double> reference_rope_frequencies(const ModelConfig& config) {
  std::vector<double> frequencies(config.head_dim / 2);
  for (std::size_t i = 0; i < frequencies.size(); ++i) {
    double& f = frequencies[i];
    f = std::pow(config.rope_theta,
                 -2 * static_cast<double>(i) / static_cast<double>(config.head_dim));
    const RopeScaling& s = config.rope_scaling;
    if (!s.llama3) continue;
    const double waves = s.original_max_position_embeddings * f / (2 * std::numbers::pi);
    if (waves < s.low_freq_factor) {
      f /= s.factor;
    } else if (waves <= s.high_freq_factor) {
      const double smooth = (waves - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor);
      f = (1 - smooth) * f / s.factor + smooth * f;
    }
  }
  return frequencies;
}

std::vector<double> reference_block(const ModelConfig& config, const LayerTensors& layer,
                                    std::size_t layer_index, std::span<const double> states) {
  std::vector<double> stream(states.begin(), states.end());

  // Attention.
  std::vector<double> x =
      reference_rms_norm(stream, values_of(layer.input_gain), config.rms_norm_eps);
  std::vector<double> q = linear(layer.q, layer.q_bias, x);
  std::vector<double> k = linear(layer.k, layer.k_bias, x);
  const std::vector<double> v = linear(layer.v, layer.v_bias, x);
  if (config.qk_norm) {
    q = reference_rms_norm(q, values_of(layer.q_gain), config.rms_norm_eps);
    k = reference_rms_norm(k, values_of(layer.k_gain), config.rms_norm_eps);
  }
  apply_rope(config, config.n_heads, q);
  apply_rope(config, config.n_kv_heads, k);
  add(linear(layer.o, layer.o_bias, attend(config, layer_index, q, k, v)), stream);

  // SwiGLU.
  x = reference_rms_norm(stream, values_of(layer.post_gain), config.rms_norm_eps);
  std::vector<double> gate = linear(layer.gate, layer.gate_bias, x);
  const std::vector<double> up = linear(layer.up, layer.up_bias, x);
  for (std::size_t i = 0; i < gate.size(); ++i) gate[i] *= up[i] / (1 + std::exp(-gate[i]));
  add(linear(layer.down, layer.down_bias, gate), stream);
  return stream;
}

absl::StatusOr<std::vector<double>> reference_body(const ModelConfig& config,
                                                   const Safetensors& weights,
                                                   std::vector<double> states) {
  for (std::size_t i = 0; i < config.n_layers; ++i) {
    const auto layer = find_layer(weights, config, i);
    if (!layer.ok()) return layer.status();
    states = reference_block(config, *layer, i, states);
  }
  const std::size_t shape[] = {config.hidden_size};
  const auto gain = weights.get("model.norm.weight", shape);
  if (!gain.ok()) return gain.status();
  return reference_rms_norm(states, values_of(*gain), config.rms_norm_eps);
}

}  // namespace infemeral
