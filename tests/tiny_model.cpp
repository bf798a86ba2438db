#include "tests/tiny_model.h"

#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <nlohmann/json.hpp>
#include <random>
#include <stdexcept>
#include <vector>

#include "engine/float16.h"
#include "engine/json_file.h"
#include "engine/text.h"

namespace infemeral {
namespace {

void check(const absl::Status& status) {
  if (!status.ok()) throw std::runtime_error(std::string(status.message()));
}

struct Tensor {
  SafetensorsWriter::Declaration declaration;
  std::vector<float> values;
};

// Draws the tensors in a fixed order, so that a seed means the same model in every layout.
class Maker {
 public:
  Maker(const TinyModelOptions& options) : o_(options), rng_(options.seed) {}

  std::vector<Tensor> make() {
    const bool is_qwen2 = o_.model_type == "qwen2", is_qwen3 = o_.model_type == "qwen3";
    const std::size_t q = o_.heads * o_.head_dim, kv = o_.kv_heads * o_.head_dim;
    matrix("model.embed_tokens.weight", o_.vocab, o_.hidden, 1);
    for (std::size_t i = 0; i < o_.layers; ++i) {
      const std::string layer = cat("model.layers.", i, ".");
      gain(layer + "input_layernorm.weight", o_.hidden);
      linear(layer + "self_attn.q_proj", q, o_.hidden, is_qwen2 || o_.biases);
      linear(layer + "self_attn.k_proj", kv, o_.hidden, is_qwen2 || o_.biases);
      linear(layer + "self_attn.v_proj", kv, o_.hidden, is_qwen2 || o_.biases);
      linear(layer + "self_attn.o_proj", o_.hidden, q, o_.biases && !is_qwen2);
      if (is_qwen3) {
        gain(layer + "self_attn.q_norm.weight", o_.head_dim);
        gain(layer + "self_attn.k_norm.weight", o_.head_dim);
      }
      gain(layer + "post_attention_layernorm.weight", o_.hidden);
      const bool mlp_bias = o_.biases && o_.model_type == "llama";
      linear(layer + "mlp.gate_proj", o_.intermediate, o_.hidden, mlp_bias);
      linear(layer + "mlp.up_proj", o_.intermediate, o_.hidden, mlp_bias);
      linear(layer + "mlp.down_proj", o_.hidden, o_.intermediate, mlp_bias);
    }
    gain("model.norm.weight", o_.hidden);
    if (!o_.tied) matrix("lm_head.weight", o_.vocab, o_.hidden, 1);
    return std::move(tensors_);
  }

 private:
  void add(const std::string& name, std::vector<std::size_t> shape, float mean, float deviation) {
    std::size_t n = 1;
    for (const std::size_t size : shape) n *= size;
    std::vector<float> values(n);
    std::normal_distribution<float> normal(mean, deviation);
    for (float& value : values) value = normal(rng_);
    tensors_.push_back({{name, o_.dtype, std::move(shape)}, std::move(values)});
  }
  void matrix(const std::string& name, std::size_t rows, std::size_t cols, float scale) {
    add(name, {rows, cols}, 0, scale / std::sqrt(static_cast<float>(cols)));
  }
  void gain(const std::string& name, std::size_t size) { add(name, {size}, 1, 0.3f); }
  void linear(const std::string& name, std::size_t out, std::size_t in, bool bias) {
    matrix(name + ".weight", out, in, 1.5f);
    if (bias) add(name + ".bias", {out}, 0, 0.3f);
  }

  const TinyModelOptions& o_;
  std::mt19937_64 rng_;
  std::vector<Tensor> tensors_;
};

void write_tensors(const std::filesystem::path& file, std::span<const Tensor> tensors) {
  std::vector<SafetensorsWriter::Declaration> declarations;
  for (const Tensor& tensor : tensors) declarations.push_back(tensor.declaration);
  auto writer = SafetensorsWriter::create(file, declarations, {{"format", "pt"}});
  check(writer.status());
  for (const Tensor& tensor : tensors) {
    if (tensor.declaration.dtype == Dtype::kF32) {
      check((*writer)->write(std::as_bytes(std::span(tensor.values))));
      continue;
    }
    const auto narrow = tensor.declaration.dtype == Dtype::kF16 ? f32_to_f16 : f32_to_bf16;
    std::vector<std::uint16_t> halves(tensor.values.size());
    for (std::size_t i = 0; i < halves.size(); ++i) halves[i] = narrow(tensor.values[i]);
    check((*writer)->write(std::as_bytes(std::span(halves))));
  }
  check((*writer)->finish());
}

nlohmann::json config_of(const TinyModelOptions& o) {
  nlohmann::json config = {
      {"model_type", o.model_type},
      {"hidden_size", o.hidden},
      {"num_hidden_layers", o.layers},
      {"num_attention_heads", o.heads},
      {"num_key_value_heads", o.kv_heads},
      {"head_dim", o.head_dim},
      {"intermediate_size", o.intermediate},
      {"vocab_size", o.vocab},
      {"max_position_embeddings", o.max_context},
      {"rms_norm_eps", 1e-5},
      {"rope_theta", 10000.0},
      {"hidden_act", "silu"},
      {"tie_word_embeddings", o.tied},
      {"torch_dtype", o.dtype == Dtype::kF32   ? "float32"
                      : o.dtype == Dtype::kF16 ? "float16"
                                               : "bfloat16"},
      {"bos_token_id", 1},
      {"eos_token_id", 2},
  };
  const std::string name = o.model_type == "llama"     ? "LlamaForCausalLM"
                           : o.model_type == "mistral" ? "MistralForCausalLM"
                           : o.model_type == "qwen2"   ? "Qwen2ForCausalLM"
                                                       : "Qwen3ForCausalLM";
  config["architectures"] = {name};
  if (o.model_type == "llama") config["mlp_bias"] = o.biases;
  if (o.model_type == "llama" || o.model_type == "qwen3") config["attention_bias"] = o.biases;
  if (o.model_type == "mistral") config["sliding_window"] = nullptr;
  config.update(nlohmann::json::parse(o.config_patch));
  return config;
}

}  // namespace

void make_tiny_model(const std::filesystem::path& folder, const TinyModelOptions& options) {
  if (!std::filesystem::create_directories(folder)) {
    throw std::runtime_error(folder.string() + " exists already");
  }
  const std::vector<Tensor> tensors = Maker(options).make();
  if (options.sharded) {
    const std::span<const Tensor> all = tensors;
    const std::span<const Tensor> shards[] = {all.first(all.size() / 2),
                                              all.subspan(all.size() / 2)};
    nlohmann::json map = nlohmann::json::object();
    for (int i = 0; i < 2; ++i) {
      const std::string name = cat("model-0000", i + 1, "-of-00002.safetensors");
      write_tensors(folder / name, shards[i]);
      for (const Tensor& tensor : shards[i]) map[tensor.declaration.name] = name;
    }
    check(write_new_file(folder / "model.safetensors.index.json",
                         nlohmann::json{{"weight_map", map}}.dump(), 0644));
  } else {
    write_tensors(folder / "model.safetensors", tensors);
  }
  check(write_new_file(folder / "config.json", config_of(options).dump(2), 0644));
  check(write_new_file(folder / "tokenizer.json", "{}", 0644));
  check(write_new_file(folder / "tokenizer_config.json", "{}", 0644));
  check(write_new_file(folder / "generation_config.json", "{}", 0644));
}

TempFolder::TempFolder() {
  std::string name = (std::filesystem::temp_directory_path() / "infemeral-test-XXXXXX").string();
  if (::mkdtemp(name.data()) == nullptr) throw std::runtime_error("cannot make " + name);
  path_ = name;
}

TempFolder::~TempFolder() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

}  // namespace infemeral
