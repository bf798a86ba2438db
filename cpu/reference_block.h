// The transformer, slowly and obviously, in float64: what preparation checks its result against and
// what the tests hold the fast bodies to. No cache, no blocking; weights are read from the mapping
// row by row.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/model_config.h"
#include "engine/safetensors.h"

namespace infemeral {

// The tensors of one layer, as views into a file; an optional one that the architecture lacks has
// no data. `gain` vectors are RMSNorm weights.
struct LayerTensors {
  TensorView input_gain;  // [H]
  TensorView q, k, v, o;  // [heads * d, H], [kv_heads * d, H] x2, [H, heads * d]
  TensorView q_bias, k_bias, v_bias, o_bias;  // by rows of the weight, or absent
  TensorView q_gain, k_gain;                  // [d] (Qwen3), or absent
  TensorView post_gain;                       // [H]
  TensorView gate, up, down;                  // [I, H] x2, [H, I]
  TensorView gate_bias, up_bias, down_bias;   // or absent
};

// "model.layers.3.": what the names of a layer's tensors begin with.
std::string layer_prefix(std::size_t layer);

// The views of layer `layer`, each checked for its shape; the errors of Safetensors::get.
absl::StatusOr<LayerTensors> find_layer(const Safetensors& weights, const ModelConfig& config,
                                        std::size_t layer);

// x / sqrt(mean(x^2) + eps) * gain, for each row of gain.size() elements.
std::vector<double> reference_rms_norm(std::span<const double> rows, std::span<const double> gain,
                                       double eps);

// The angle per position of each of the head_dim / 2 rotations of RoPE, with Llama 3's stretch:
// frequencies whose wave is longer than the original context are divided by the factor, those well
// inside it stay, and between the two it goes over smoothly (transformers, modeling_rope_utils.py).
std::vector<double> reference_rope_frequencies(const ModelConfig& config);

// One block on rows x H states at positions 0, 1, ...: causal attention and SwiGLU, both with
// their residual connections. Returns rows x H.
std::vector<double> reference_block(const ModelConfig& config, const LayerTensors& layer,
                                    std::size_t layer_index, std::span<const double> states);

// All blocks and the final norm (with model.norm.weight). Returns rows x H.
absl::StatusOr<std::vector<double>> reference_body(const ModelConfig& config,
                                                   const Safetensors& weights,
                                                   std::vector<double> states);

}  // namespace infemeral
