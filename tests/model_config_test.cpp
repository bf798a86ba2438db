#include "engine/model_config.h"

#include <catch2/catch.hpp>
#include <fstream>
#include <nlohmann/json.hpp>

#include "engine/text.h"
#include "tests/tiny_model.h"

namespace infemeral {
namespace {

using nlohmann::json;

// The fields of the published config.json files that the forward pass knows.
json smollm2() {
  return json::parse(R"({"architectures": ["LlamaForCausalLM"], "attention_bias": false,
    "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576,
    "intermediate_size": 1536, "max_position_embeddings": 8192, "mlp_bias": false,
    "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30,
    "num_key_value_heads": 3, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": false,
    "rope_scaling": null, "rope_theta": 100000, "tie_word_embeddings": true,
    "torch_dtype": "bfloat16", "vocab_size": 49152})");
}

json llama31() {
  return json::parse(R"({"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "max_position_embeddings": 131072, "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "vocab_size": 128256,
    "tie_word_embeddings": false, "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}})");
}

json mistral() {
  return json::parse(R"({"model_type": "mistral", "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 32000})");
}

json qwen2() {
  return json::parse(R"({"model_type": "qwen2", "hidden_act": "silu", "hidden_size": 896,
    "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 21,
    "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 4096,
    "tie_word_embeddings": true, "use_sliding_window": false, "vocab_size": 151936})");
}

json qwen3() {
  return json::parse(R"({"model_type": "qwen3", "attention_bias": false, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 1024, "intermediate_size": 3072,
    "max_position_embeddings": 40960, "max_window_layers": 28, "num_attention_heads": 16,
    "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_scaling": null, "rope_theta": 1000000, "sliding_window": null,
    "tie_word_embeddings": true, "use_sliding_window": false, "vocab_size": 151936})");
}

absl::StatusOr<ModelConfig> parse(const json& root) {
  return parse_model_config(root.dump());
}

json with(json root, const char* name, json value) {
  root[name] = std::move(value);
  return root;
}

json without(json root, const char* name) {
  root.erase(name);
  return root;
}

}  // namespace

TEST_CASE("published configurations are understood") {
  const auto smol = parse(smollm2());
  REQUIRE(smol.ok());
  CHECK(smol->model_type == "llama");
  CHECK(smol->hidden_size == 576);
  CHECK(smol->intermediate_size == 1536);
  CHECK(smol->n_layers == 30);
  CHECK(smol->n_heads == 9);
  CHECK(smol->n_kv_heads == 3);
  CHECK(smol->head_dim == 64);
  CHECK(smol->vocab_size == 49152);
  CHECK(smol->max_context == 8192);
  CHECK(smol->rms_norm_eps == 1e-5);
  CHECK(smol->rope_theta == 100000);
  CHECK_FALSE(smol->rope_scaling.llama3);
  CHECK(smol->tie_word_embeddings);
  CHECK_FALSE(smol->qkv_bias);

  const auto llama = parse(llama31());
  REQUIRE(llama.ok());
  CHECK(llama->rope_scaling.llama3);
  CHECK(llama->rope_scaling.factor == 8);
  CHECK(llama->rope_scaling.low_freq_factor == 1);
  CHECK(llama->rope_scaling.high_freq_factor == 4);
  CHECK(llama->rope_scaling.original_max_position_embeddings == 8192);

  const auto mistral_config = parse(mistral());
  REQUIRE(mistral_config.ok());
  CHECK(mistral_config->sliding_window == 4096);
  CHECK(mistral_config->sliding_from_layer == 0);

  const auto qwen2_config = parse(qwen2());
  REQUIRE(qwen2_config.ok());
  CHECK(qwen2_config->qkv_bias);
  CHECK_FALSE(qwen2_config->o_bias);
  CHECK(qwen2_config->sliding_window == 0);
  CHECK(qwen2_config->head_dim == 64);

  const auto qwen3_config = parse(qwen3());
  REQUIRE(qwen3_config.ok());
  CHECK(qwen3_config->qk_norm);
  CHECK_FALSE(qwen3_config->qkv_bias);
  CHECK(qwen3_config->head_dim == 128);
}

TEST_CASE("RoPE is read in the old and in the new style") {
  json modern = without(without(llama31(), "rope_theta"), "rope_scaling");
  modern["rope_parameters"] = llama31()["rope_scaling"];
  modern["rope_parameters"]["rope_theta"] = 500000.0;
  const auto config = parse(modern);
  REQUIRE(config.ok());
  CHECK(config->rope_theta == 500000);
  CHECK(config->rope_scaling.factor == 8);

  const auto plain = parse(with(without(smollm2(), "rope_theta"), "rope_parameters",
                                {{"rope_type", "default"}, {"rope_theta", 1234.5}}));
  REQUIRE(plain.ok());
  CHECK(plain->rope_theta == 1234.5);
  CHECK(parse(without(smollm2(), "rope_theta"))->rope_theta == 10000);

  // A linear stretch by 1 is none; the oldest style calls the field "type".
  CHECK(parse(with(smollm2(), "rope_scaling", {{"type", "linear"}, {"factor", 1.0}})).ok());
  CHECK_FALSE(parse(with(smollm2(), "rope_scaling", {{"type", "linear"}, {"factor", 2.0}})).ok());
}

TEST_CASE("biases and defaults follow the architecture") {
  const auto biased = parse(with(with(smollm2(), "attention_bias", true), "mlp_bias", true));
  REQUIRE(biased.ok());
  CHECK(biased->qkv_bias);
  CHECK(biased->o_bias);
  CHECK(biased->mlp_bias);
  CHECK(parse(without(smollm2(), "num_key_value_heads"))->n_kv_heads == 9);
  CHECK(parse(without(qwen3(), "head_dim"))->head_dim == 128);
  CHECK(parse(with(smollm2(), "head_dim", nullptr))->head_dim == 64);
  CHECK(parse(with(smollm2(), "head_dim", 32))->head_dim == 32);
  CHECK(parse(without(smollm2(), "rms_norm_eps"))->rms_norm_eps == 1e-6);
}

TEST_CASE("sliding windows") {
  CHECK(parse(with(mistral(), "sliding_window", nullptr))->sliding_window == 0);
  CHECK(parse(with(mistral(), "sliding_window", 32768))->sliding_window == 0);  // the whole context
  // MistralConfig's default; null is none, a missing key is not.
  CHECK(parse(without(mistral(), "sliding_window"))->sliding_window == 4096);
  CHECK(parse(with(without(mistral(), "sliding_window"), "max_position_embeddings", 4096))
            ->sliding_window == 0);
  json full = json::array();
  for (int i = 0; i < 32; ++i) full.push_back("full_attention");
  CHECK(parse(with(without(mistral(), "sliding_window"), "layer_types", full))->sliding_window ==
        0);
  CHECK(parse(without(smollm2(), "sliding_window"))->sliding_window == 0);
  const auto qwen = parse(with(qwen2(), "use_sliding_window", true));
  REQUIRE(qwen.ok());
  CHECK(qwen->sliding_window == 4096);
  CHECK(qwen->sliding_from_layer == 21);
  CHECK(parse(with(with(qwen2(), "use_sliding_window", true), "max_window_layers", 24))
            ->sliding_window == 0);

  json types = json::array();
  for (int i = 0; i < 24; ++i) types.push_back(i < 20 ? "full_attention" : "sliding_attention");
  const auto listed = parse(with(qwen2(), "layer_types", types));
  REQUIRE(listed.ok());
  CHECK(listed->sliding_window == 4096);
  CHECK(listed->sliding_from_layer == 20);
  std::swap(types[0], types[23]);
  CHECK(absl::IsUnimplemented(parse(with(qwen2(), "layer_types", types)).status()));
  types.erase(types.begin());
  CHECK(absl::IsInvalidArgument(parse(with(qwen2(), "layer_types", types)).status()));
  json all_full = json::array();
  for (int i = 0; i < 24; ++i) all_full.push_back("full_attention");
  CHECK(parse(with(qwen2(), "layer_types", all_full))->sliding_window == 0);
}

TEST_CASE("what would change the forward pass is refused by name and value") {
  const std::vector<std::pair<const char*, json>> cases = {
      {"model_type", "gemma2"},
      {"model_type", 7},
      {"hidden_act", "gelu"},
      {"rope_scaling", {{"rope_type", "yarn"}, {"factor", 4.0}}},
      {"rope_scaling", {{"type", "dynamic"}, {"factor", 4.0}}},
      {"rope_scaling", {{"rope_type", "longrope"}}},
      {"rope_parameters", {{"full_attention", {{"rope_type", "default"}}}}},
      {"partial_rotary_factor", 0.5},
      {"quantization_config", {{"quant_method", "gptq"}}},
      {"num_experts", 8},
      {"num_local_experts", 8},
      {"attn_logit_softcapping", 50.0},
      {"no_rope_layers", {1, 1, 1, 0}},
  };
  for (const auto& [name, value] : cases) {
    const absl::Status status = parse(with(smollm2(), name, value)).status();
    INFO(status.ToString());
    CHECK(absl::IsUnimplemented(status));
    const std::string message(status.message());
    CHECK(message.starts_with("config.json: "));
    CHECK(message.find(std::string(name).substr(0, 4)) != std::string::npos);
  }
  CHECK(absl::IsUnimplemented(parse(with(mistral(), "attention_bias", true)).status()));
  CHECK(absl::IsUnimplemented(parse(with(qwen2(), "mlp_bias", true)).status()));
}

TEST_CASE("missing and impossible fields are refused by name") {
  for (const char* name : {"model_type", "hidden_size", "intermediate_size", "num_hidden_layers",
                           "num_attention_heads", "vocab_size", "max_position_embeddings"}) {
    const absl::Status status = parse(without(smollm2(), name)).status();
    CHECK(absl::IsInvalidArgument(status));
    CHECK(std::string(status.message()).find(name) != std::string::npos);
  }
  CHECK(absl::IsInvalidArgument(parse(without(qwen2(), "num_key_value_heads")).status()));
  const std::vector<std::pair<const char*, json>> cases = {
      {"hidden_size", 0},
      {"hidden_size", -576},
      {"hidden_size", 576.5},
      {"hidden_size", "576"},
      {"hidden_size", 1e300},
      {"hidden_size", 577},
      {"num_hidden_layers", 1e9},
      {"num_attention_heads", 4294967296},
      {"num_key_value_heads", 4},
      {"head_dim", 63},
      {"head_dim", json::array()},
      {"vocab_size", true},
      {"rms_norm_eps", 0},
      {"rms_norm_eps", -1e-5},
      {"rope_theta", "10000"},
      {"tie_word_embeddings", "yes"},
      {"attention_bias", 1},
      {"rope_scaling", "llama3"},
      {"max_position_embeddings", 1e12},
  };
  for (const auto& [name, value] : cases) {
    const absl::Status status = parse(with(smollm2(), name, value)).status();
    INFO(name << " " << value << " " << status.ToString());
    CHECK(absl::IsInvalidArgument(status));
    CHECK(std::string(status.message()).find(name) != std::string::npos);
  }
  for (const char* name :
       {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}) {
    json config = llama31();
    config["rope_scaling"].erase(name);
    CHECK(absl::IsInvalidArgument(parse(config).status()));
  }
  for (const char* text : {"", "null", "[]", "{", "3", "{}"}) {
    CHECK(absl::IsInvalidArgument(parse_model_config(text).status()));
  }
  CHECK(absl::IsInvalidArgument(
      parse_model_config(cat(std::string(100000, '['), std::string(100000, ']'))).status()));
}

TEST_CASE("a folder's configuration is loaded, and errors name the folder") {
  const TempFolder folder;
  for (const char* type : {"llama", "mistral", "qwen2", "qwen3"}) {
    make_tiny_model(folder.path() / type, {.model_type = type});
    const auto config = load_model_config(folder.path() / type);
    REQUIRE(config.ok());
    CHECK(config->model_type == type);
    CHECK(config->sliding_window == 0);
  }
  CHECK(absl::IsNotFound(load_model_config(folder.path()).status()));
  std::ofstream(folder.path() / "config.json") << "{}";
  const absl::Status status = load_model_config(folder.path()).status();
  CHECK(std::string(status.message()).starts_with(folder.path().string()));
}

}  // namespace infemeral
