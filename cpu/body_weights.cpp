#include "cpu/body_weights.h"

#include <string>
#include <utility>

#include "cpu/int8_weights.h"
#include "engine/text.h"

namespace infemeral {
namespace {

// Reads tensors and keeps the first error, so that the caller checks once.
class Reader {
 public:
  explicit Reader(const Safetensors& tensors) : tensors_(tensors) {}

  std::vector<float> vector(const std::string& name, std::size_t size) {
    std::vector<float> values;
    if (const TensorView* view = get(name, {size})) {
      values.resize(size);
      view->read(0, values);
    }
    return values;
  }

  LinearWeights linear(const std::string& name, std::size_t out, std::size_t in, bool bias) {
    LinearWeights weights;
    if (status_.ok()) {
      const std::size_t shape[] = {out, in};
      auto tensor = find_matrix(tensors_, name + ".weight", shape);
      if (!tensor.ok()) {
        status_ = tensor.status();
        return weights;
      }
      weights.tensor = *std::move(tensor);
      tensors_.expect_streaming(weights.tensor);
      const auto matrix = matrix_of(weights.tensor, name + ".weight");
      matrix.ok() ? void(weights.weight = *matrix) : void(status_ = matrix.status());
    }
    if (bias) weights.bias = vector(name + ".bias", out);
    return weights;
  }

  const absl::Status& status() const { return status_; }

 private:
  const TensorView* get(const std::string& name, const std::vector<std::size_t>& shape) {
    if (!status_.ok()) return nullptr;
    const absl::StatusOr<TensorView> view = tensors_.get(name, shape);
    if (!view.ok()) {
      status_ = view.status();
      return nullptr;
    }
    return tensors_.find(name);
  }

  const Safetensors& tensors_;
  absl::Status status_;
};

}  // namespace

absl::StatusOr<BodyWeights> BodyWeights::load(const std::filesystem::path& folder) {
  auto config = load_model_config(folder);
  if (!config.ok()) return config.status();
  auto tensors = Safetensors::open_folder(folder);
  if (!tensors.ok()) return tensors.status();

  BodyWeights weights;
  weights.config = *std::move(config);
  weights.tensors = *std::move(tensors);
  const ModelConfig& c = weights.config;
  const std::size_t q_size = c.n_heads * c.head_dim, kv_size = c.n_kv_heads * c.head_dim;
  Reader reader(weights.tensors);
  for (std::size_t i = 0; i < c.n_layers && reader.status().ok(); ++i) {
    const std::string layer = cat("model.layers.", i, ".");
    const std::string attention = layer + "self_attn.", mlp = layer + "mlp.";
    LayerWeights& w = weights.layers.emplace_back();
    w.attention_gain = reader.vector(layer + "input_layernorm.weight", c.hidden_size);
    w.q = reader.linear(attention + "q_proj", q_size, c.hidden_size, c.qkv_bias);
    w.k = reader.linear(attention + "k_proj", kv_size, c.hidden_size, c.qkv_bias);
    w.v = reader.linear(attention + "v_proj", kv_size, c.hidden_size, c.qkv_bias);
    if (c.qk_norm) {
      w.q_gain = reader.vector(attention + "q_norm.weight", c.head_dim);
      w.k_gain = reader.vector(attention + "k_norm.weight", c.head_dim);
    }
    w.o = reader.linear(attention + "o_proj", c.hidden_size, q_size, c.o_bias);
    w.mlp_gain = reader.vector(layer + "post_attention_layernorm.weight", c.hidden_size);
    w.gate = reader.linear(mlp + "gate_proj", c.intermediate_size, c.hidden_size, c.mlp_bias);
    w.up = reader.linear(mlp + "up_proj", c.intermediate_size, c.hidden_size, c.mlp_bias);
    w.down = reader.linear(mlp + "down_proj", c.hidden_size, c.intermediate_size, c.mlp_bias);
  }
  weights.final_gain = reader.vector("model.norm.weight", c.hidden_size);
  if (!reader.status().ok()) {
    return absl::Status(reader.status().code(),
                        cat(folder.string(), ": ", reader.status().message()));
  }
  weights.dtype = weights.tensors.find("model.layers.0.self_attn.q_proj.weight")->dtype;
  return weights;
}

}  // namespace infemeral
