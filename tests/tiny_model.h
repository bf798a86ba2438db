// Small random checkpoints in the layout of Hugging Face, for tests: real file formats, sizes that
// take milliseconds, and no value that a wrong computation could hide behind (gains are not 1,
// biases not 0).
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>

#include "engine/safetensors.h"

namespace infemeral {

struct TinyModelOptions {
  std::string model_type = "llama";  // "llama", "mistral", "qwen2" or "qwen3"
  std::size_t hidden = 64;
  std::size_t layers = 2;
  std::size_t heads = 4;
  std::size_t kv_heads = 2;
  std::size_t head_dim = 16;  // need not be hidden / heads
  std::size_t intermediate = 96;
  std::size_t vocab = 128;
  std::size_t max_context = 256;
  bool tied = false;  // no lm_head.weight, and the configuration says so
  // Llama's and Qwen3's optional biases (q, k, v, o; Llama also gate, up, down). Qwen2 always has
  // its own on q, k, v.
  bool biases = false;
  Dtype dtype = Dtype::kF32;  // of every tensor
  bool sharded = false;       // two shards and an index instead of one file
  std::uint64_t seed = 1;
  // Fields merged into config.json, as a JSON object: rope_scaling, sliding_window, ...
  std::string config_patch = "{}";
};

// Writes config.json, the weights and minimal tokenizer files into `folder`, which must not exist.
// Throws std::runtime_error when it cannot: a test then fails.
void make_tiny_model(const std::filesystem::path& folder, const TinyModelOptions& options);

// A fresh folder under the system's temporary one; removed with everything in it.
class TempFolder {
 public:
  TempFolder();
  ~TempFolder();
  TempFolder(const TempFolder&) = delete;
  TempFolder& operator=(const TempFolder&) = delete;
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

}  // namespace infemeral
