// The weights of the transformer layers, as views into a mapped checkpoint.
#pragma once

#include <filesystem>
#include <vector>

#include "absl/status/statusor.h"
#include "cpu/linear.h"
#include "engine/model_config.h"
#include "engine/safetensors.h"

namespace infemeral {

// [out, in] and, where the architecture has one, a bias [out].
struct LinearWeights {
  TensorView tensor;  // what weight points into, where it is not the file
  Matrix weight;
  std::vector<float> bias;  // empty: none

  Linear into(const Rows& out) const {
    return {&weight, bias.empty() ? nullptr : bias.data(), out};
  }
};

struct LayerWeights {
  std::vector<float> attention_gain;  // H
  LinearWeights q;                    // n_heads * head_dim x H
  LinearWeights k, v;                 // n_kv_heads * head_dim x H
  std::vector<float> q_gain, k_gain;  // head_dim each, or empty (Qwen3's norms)
  LinearWeights o;                    // H x n_heads * head_dim
  std::vector<float> mlp_gain;        // H
  LinearWeights gate, up;             // intermediate x H
  LinearWeights down;                 // H x intermediate
};

// The format_version of infemeral.json, which engine_prep writes beside a body.
inline constexpr int kBodyFormatVersion = 1;
inline constexpr int kInt8BodyFormatVersion = 2;

struct BodyWeights {
  // A Hugging Face folder, rotated by engine_prep or plain. Errors: those of Safetensors and of
  // load_model_config.
  static absl::StatusOr<BodyWeights> load(const std::filesystem::path& folder);

  ModelConfig config;
  Safetensors tensors;  // what the views below point into
  std::vector<LayerWeights> layers;
  std::vector<float> final_gain;  // H
  Dtype dtype = Dtype::kF32;      // of the first layer's matrices
};

}  // namespace infemeral
