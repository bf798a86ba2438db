// The part of a Hugging Face config.json that the Llama family's forward pass needs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace infemeral {

// Llama 3's frequency-dependent stretch of RoPE ("rope_type": "llama3").
struct RopeScaling {
  bool llama3 = false;
  double factor = 1;
  double low_freq_factor = 1;
  double high_freq_factor = 1;
  double original_max_position_embeddings = 0;
};

struct ModelConfig {
  // quantization_config's quant_method in an int8 body: the one that load_model_config accepts.
  static constexpr const char* kInt8Method = "infemeral_int8";

  std::string model_type;  // "llama", "mistral", "qwen2", "qwen3"
  std::size_t hidden_size = 0;
  std::size_t intermediate_size = 0;
  std::size_t n_layers = 0;
  std::size_t n_heads = 0;
  std::size_t n_kv_heads = 0;
  std::size_t head_dim = 0;
  std::size_t vocab_size = 0;
  std::size_t max_context = 0;  // max_position_embeddings
  double rms_norm_eps = 1e-6;
  double rope_theta = 10000;
  RopeScaling rope_scaling;
  bool qkv_bias = false;             // q, k, v projections
  bool o_bias = false;               // attention output projection
  bool mlp_bias = false;             // gate, up, down
  bool qk_norm = false;              // RMSNorm over head_dim on q and k (Qwen3)
  bool tie_word_embeddings = false;  // what the file says; preparation compares the tensors instead
  std::size_t sliding_window = 0;    // 0: none; else layers >= sliding_from_layer see this many
  std::size_t sliding_from_layer = 0;
};

// Llama, Mistral, Qwen2/2.5, Qwen3 and SmolLM (a Llama). Unimplemented, naming the field and its
// value, for anything whose forward pass would differ (model_type, hidden_act, rope types, ...);
// InvalidArgument for a missing or impossible field.
absl::StatusOr<ModelConfig> parse_model_config(std::string_view json);
absl::StatusOr<ModelConfig> load_model_config(const std::filesystem::path& folder);

}  // namespace infemeral
