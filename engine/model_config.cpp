#include "engine/model_config.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>

#include "engine/json_file.h"
#include "engine/text.h"

namespace infemeral {
namespace {

using nlohmann::json;

constexpr std::size_t kMaxConfigBytes = 16 << 20;

// Limits that no model comes near; below them no product of two sizes overflows.
constexpr std::size_t kMaxWidth = 1 << 20;
constexpr std::size_t kMaxVocab = 1 << 24;
constexpr std::size_t kMaxContext = 1u << 31;
constexpr std::size_t kMaxLayers = 4096;

std::string shown(const json& value) {
  constexpr std::size_t kShown = 200;
  const std::string text =
      value.dump(-1, ' ', false, json::error_handler_t::replace).substr(0, kShown + 1);
  return text.size() > kShown ? text.substr(0, kShown) + "..." : text;
}

// A field of an object; null counts as absent, as it does in transformers.
const json* field(const json& object, std::string_view name) {
  const auto it = object.find(std::string(name));
  return it == object.end() || it->is_null() ? nullptr : &*it;
}

absl::Status unsupported(std::string_view name, const json& value, std::string_view what) {
  return absl::UnimplementedError(cat("config.json: ", name, " is ", shown(value), "; ", what));
}

absl::Status invalid(std::string_view name, const json& value, std::string_view what) {
  return absl::InvalidArgumentError(cat("config.json: ", name, " is ", shown(value), "; ", what));
}

// Reads typed fields of one object and keeps the first error, so that the caller checks once.
class Fields {
 public:
  Fields(const json& object, absl::Status& status) : object_(object), status_(status) {}

  void size(std::string_view name, std::size_t& out, std::size_t max, bool required = true) {
    const json* value = field(object_, name);
    if (value == nullptr) return required ? missing(name) : void();
    // transformers writes some counts as floats (original_max_position_embeddings: 8192.0).
    const double number = value->is_number() ? value->get<double>() : -1;
    if (!(number >= 1 && number <= static_cast<double>(max)) || number != std::floor(number)) {
      return keep(invalid(name, *value, cat("an integer from 1 to ", max, " is needed")));
    }
    out = static_cast<std::size_t>(number);
  }
  void positive(std::string_view name, double& out, bool required = true) {
    const json* value = field(object_, name);
    if (value == nullptr) return required ? missing(name) : void();
    const double number = value->is_number() ? value->get<double>() : -1;
    if (!(number > 0 && number <= std::numeric_limits<float>::max())) {
      return keep(invalid(name, *value, "a positive number is needed"));
    }
    out = number;
  }
  void flag(std::string_view name, bool& out) {
    const json* value = field(object_, name);
    if (value == nullptr) return;
    if (!value->is_boolean()) return keep(invalid(name, *value, "true or false is needed"));
    out = value->get<bool>();
  }
  // A field that must be absent, null, false, zero or empty.
  void refuse(std::string_view name, std::string_view what) {
    const json* value = field(object_, name);
    if (value == nullptr || *value == false || (value->is_number() && *value == 0) ||
        (value->is_structured() && value->empty())) {
      return;
    }
    keep(unsupported(name, *value, what));
  }
  void keep(absl::Status status) {
    if (status_.ok()) status_ = std::move(status);
  }

 private:
  void missing(std::string_view name) {
    keep(absl::InvalidArgumentError(cat("config.json: ", name, " is missing")));
  }
  const json& object_;
  absl::Status& status_;
};

// transformers up to 4 writes "rope_theta" beside "rope_scaling"; 5 writes both into
// "rope_parameters". An object of either name is read the same way.
void read_rope(const json& root, ModelConfig& config, absl::Status& status) {
  Fields top(root, status);
  top.positive("rope_theta", config.rope_theta, false);
  for (const std::string_view name : {"rope_scaling", "rope_parameters"}) {
    const json* rope = field(root, name);
    if (rope == nullptr) continue;
    if (!rope->is_object()) return top.keep(invalid(name, *rope, "an object is needed"));
    Fields fields(*rope, status);
    for (const auto& [key, value] : rope->items()) {
      if (value.is_object()) {
        return top.keep(
            unsupported(name, *rope, "RoPE parameters per layer type are not supported"));
      }
    }
    fields.positive("rope_theta", config.rope_theta, false);
    if (const json* part = field(*rope, "partial_rotary_factor"); part != nullptr && *part != 1) {
      return top.keep(unsupported("partial_rotary_factor", *part, "only 1 is supported"));
    }
    const json* type = field(*rope, "rope_type");
    if (type == nullptr) type = field(*rope, "type");
    if (type == nullptr || *type == "default") continue;
    if (*type == "linear") {
      if (const json* factor = field(*rope, "factor"); factor != nullptr && *factor == 1) continue;
    }
    if (*type != "llama3") {
      return top.keep(
          unsupported(cat(name, ".rope_type"), *type, "\"default\" and \"llama3\" are supported"));
    }
    RopeScaling& scaling = config.rope_scaling;
    scaling.llama3 = true;
    fields.positive("factor", scaling.factor);
    fields.positive("low_freq_factor", scaling.low_freq_factor);
    fields.positive("high_freq_factor", scaling.high_freq_factor);
    fields.positive("original_max_position_embeddings", scaling.original_max_position_embeddings);
    if (status.ok() && scaling.high_freq_factor <= scaling.low_freq_factor) {
      fields.keep(invalid("high_freq_factor", *field(*rope, "high_freq_factor"),
                          "it must be above low_freq_factor"));
    }
  }
}

// Which layers see only a window. Mistral: all; Qwen: those from max_window_layers on when
// use_sliding_window; a list layer_types (transformers 5) says it layer by layer.
void read_sliding_window(const json& root, ModelConfig& config, absl::Status& status) {
  Fields fields(root, status);
  const bool qwen = config.model_type == "qwen2" || config.model_type == "qwen3";
  const bool mistral = config.model_type == "mistral";
  // transformers' MistralConfig: a missing key is its default, and only null is none.
  const bool is_default = mistral && !root.contains("sliding_window");
  bool use = mistral && (is_default || field(root, "sliding_window") != nullptr);
  if (qwen) fields.flag("use_sliding_window", use);

  std::size_t first = 0;
  if (qwen && use) {
    first = config.n_layers;
    if (const json* from = field(root, "max_window_layers"); from != nullptr) {
      if (!from->is_number_unsigned()) {
        return fields.keep(invalid("max_window_layers", *from, "a layer number is needed"));
      }
      first = from->get<std::size_t>();
    } else if (field(root, "layer_types") == nullptr) {
      return fields.keep(absl::InvalidArgumentError(
          "config.json: use_sliding_window is true, but max_window_layers is missing"));
    }
  }
  if (const json* types = field(root, "layer_types"); types != nullptr) {
    if (!types->is_array() || types->size() != config.n_layers) {
      return fields.keep(invalid("layer_types", *types, "one entry a layer is needed"));
    }
    first = config.n_layers;
    for (std::size_t i = 0; i < types->size(); ++i) {
      const json& type = types->at(i);
      if (type == "sliding_attention") {
        first = std::min(first, i);
      } else if (type != "full_attention" || first < i) {
        return fields.keep(unsupported(
            "layer_types", *types,
            "only full_attention layers followed by sliding_attention layers are supported"));
      }
    }
    use = first < config.n_layers;
  }
  if (!use || first >= config.n_layers || !status.ok()) return;
  if (is_default) config.sliding_window = 4096;
  fields.size("sliding_window", config.sliding_window, kMaxContext, !is_default);
  config.sliding_from_layer = first;
  // A window as long as the context never hides anything.
  if (config.sliding_window >= config.max_context) {
    config.sliding_window = config.sliding_from_layer = 0;
  }
}

void refuse_what_changes_the_forward_pass(const json& root, absl::Status& status) {
  Fields fields(root, status);
  const auto own = root.find("quantization_config");
  const bool is_own = own != root.end() && own->is_object() &&
                      own->value("quant_method", json()) == ModelConfig::kInt8Method;
  for (const char* name : {"quantization_config", "compression_config"}) {
    if (is_own && name == std::string_view("quantization_config")) continue;
    fields.refuse(name, "quantised checkpoints are not supported; use the unquantised model");
  }
  for (const char* name : {"num_experts", "num_local_experts", "n_routed_experts",
                           "moe_intermediate_size", "num_experts_per_tok"}) {
    fields.refuse(name, "mixtures of experts are not supported");
  }
  for (const char* name :
       {"attn_logit_softcapping", "final_logit_softcapping", "logit_scale", "logits_scaling",
        "attention_multiplier", "embedding_multiplier", "residual_multiplier",
        "query_pre_attn_scalar", "no_rope_layers", "no_rope_layer_interval", "clip_qkv", "alibi",
        "use_parallel_residual", "parallel_attn", "use_qk_norm", "vision_config", "text_config"}) {
    fields.refuse(name, "this variation of the Llama family is not supported");
  }
  for (const char* name : {"partial_rotary_factor", "rotary_pct"}) {
    if (const json* value = field(root, name); value != nullptr && *value != 1) {
      fields.keep(unsupported(name, *value, "only 1 is supported"));
    }
  }
  for (const char* name : {"hidden_act", "hidden_activation"}) {
    if (const json* value = field(root, name);
        value != nullptr && *value != "silu" && *value != "swish") {
      fields.keep(unsupported(name, *value, "only \"silu\" is supported"));
    }
  }
}

void read_sizes(const json& root, ModelConfig& config, absl::Status& status) {
  Fields fields(root, status);
  fields.size("hidden_size", config.hidden_size, kMaxWidth);
  fields.size("intermediate_size", config.intermediate_size, kMaxWidth);
  fields.size("num_hidden_layers", config.n_layers, kMaxLayers);
  fields.size("num_attention_heads", config.n_heads, kMaxWidth);
  fields.size("vocab_size", config.vocab_size, kMaxVocab);
  fields.size("max_position_embeddings", config.max_context, kMaxContext);
  if (!status.ok()) return;

  // The defaults are those of transformers' classes; where they are surprising the field is needed.
  config.n_kv_heads = config.n_heads;
  fields.size("num_key_value_heads", config.n_kv_heads, kMaxWidth, config.model_type != "llama");
  if (const json* value = field(root, "head_dim"); value != nullptr) {
    fields.size("head_dim", config.head_dim, kMaxWidth);
  } else if (config.model_type == "qwen3") {
    config.head_dim = 128;
  } else if (config.hidden_size % config.n_heads == 0) {
    config.head_dim = config.hidden_size / config.n_heads;
  } else {
    fields.keep(invalid("hidden_size", config.hidden_size,
                        "without head_dim it must be a multiple of num_attention_heads"));
  }
  if (!status.ok()) return;
  if (config.n_heads % config.n_kv_heads != 0) {
    fields.keep(
        invalid("num_key_value_heads", config.n_kv_heads, "it must divide num_attention_heads"));
  }
  if (config.head_dim % 2 != 0) {
    fields.keep(invalid("head_dim", config.head_dim, "it must be even"));
  }
  if (config.n_heads * config.head_dim > kMaxWidth) {
    fields.keep(invalid("num_attention_heads", config.n_heads,
                        "times head_dim it is beyond any model's width"));
  }
}

absl::StatusOr<ModelConfig> read(const json& root) {
  if (!root.is_object()) {
    return absl::InvalidArgumentError("config.json: the file does not hold a JSON object");
  }
  ModelConfig config;
  const json* type = field(root, "model_type");
  if (type == nullptr) return absl::InvalidArgumentError("config.json: model_type is missing");
  if (*type != "llama" && *type != "mistral" && *type != "qwen2" && *type != "qwen3") {
    return unsupported("model_type", *type,
                       "\"llama\", \"mistral\", \"qwen2\" and \"qwen3\" are supported");
  }
  config.model_type = type->get<std::string>();

  absl::Status status;
  refuse_what_changes_the_forward_pass(root, status);
  if (status.ok()) read_sizes(root, config, status);
  if (status.ok()) read_rope(root, config, status);
  if (status.ok()) read_sliding_window(root, config, status);

  Fields fields(root, status);
  fields.positive("rms_norm_eps", config.rms_norm_eps, false);
  fields.flag("tie_word_embeddings", config.tie_word_embeddings);
  // Which of the linear layers have a bias is partly a field, partly the architecture's.
  if (config.model_type == "mistral" || config.model_type == "qwen2") {
    if (config.model_type == "mistral") {
      fields.refuse("attention_bias", "Mistral's attention has no biases");
    }
    config.qkv_bias = config.model_type == "qwen2";
  } else {
    fields.flag("attention_bias", config.qkv_bias);
    config.o_bias = config.qkv_bias;
  }
  if (config.model_type == "llama") {
    fields.flag("mlp_bias", config.mlp_bias);
  } else {
    fields.refuse("mlp_bias", "only Llama's MLP can have biases");
  }
  config.qk_norm = config.model_type == "qwen3";
  if (!status.ok()) return status;
  return config;
}

}  // namespace

absl::StatusOr<ModelConfig> parse_model_config(std::string_view text) {
  const auto root = parse_json(text, "config.json");
  if (!root.ok()) return root.status();
  try {
    return read(*root);
  } catch (const std::exception& e) {
    return absl::InternalError(cat("config.json: ", e.what()));
  }
}

absl::StatusOr<ModelConfig> load_model_config(const std::filesystem::path& folder) {
  const auto text = read_text_file(folder / "config.json", kMaxConfigBytes);
  if (!text.ok()) return text.status();
  auto config = parse_model_config(*text);
  if (!config.ok()) {
    return absl::Status(config.status().code(),
                        cat(folder.string(), "/", config.status().message()));
  }
  return config;
}

}  // namespace infemeral
