#include "cpu/model_hash.h"

#include <sodium.h>

#include <bit>
#include <cstdint>

#include "engine/text.h"

namespace infemeral {
namespace {

class Hash {
 public:
  Hash() { crypto_generichash_init(&state_, nullptr, 0, sizeof(Fingerprint)); }
  void add(const void* data, std::size_t size) {
    crypto_generichash_update(&state_, static_cast<const unsigned char*>(data), size);
  }
  // With its length in front: no two lists of texts give the same bytes.
  void add(std::string_view text) {
    const std::uint64_t size = text.size();
    add(&size, sizeof size);
    add(text.data(), text.size());
  }
  Fingerprint finish() {
    Fingerprint result;
    crypto_generichash_final(&state_, result.data(), result.size());
    return result;
  }

 private:
  crypto_generichash_state state_;
};

std::string exact(double value) {
  return cat(absl::Hex(std::bit_cast<std::uint64_t>(value), absl::kZeroPad16));
}

// One line a field; never reordered, so that a model keeps its fingerprint.
std::string canonical_text(const ModelConfig& c) {
  const RopeScaling& s = c.rope_scaling;
  return cat("model_type ", c.model_type, "\nhidden_size ", c.hidden_size, "\nintermediate_size ",
             c.intermediate_size, "\nn_layers ", c.n_layers, "\nn_heads ", c.n_heads,
             "\nn_kv_heads ", c.n_kv_heads, "\nhead_dim ", c.head_dim, "\nvocab_size ",
             c.vocab_size, "\nmax_context ", c.max_context, "\nrms_norm_eps ",
             exact(c.rms_norm_eps), "\nrope_theta ", exact(c.rope_theta), "\nrope_llama3 ",
             int{s.llama3}, " ", exact(s.factor), " ", exact(s.low_freq_factor), " ",
             exact(s.high_freq_factor), " ", exact(s.original_max_position_embeddings), "\nbiases ",
             int{c.qkv_bias}, int{c.o_bias}, int{c.mlp_bias}, "\nqk_norm ", int{c.qk_norm},
             "\nsliding ", c.sliding_window, " ", c.sliding_from_layer, "\n");
}

}  // namespace

bool ModelHash::add(std::string_view name, const TensorView& tensor) {
  if (tensors_.contains(name)) return false;
  Hash hash;
  hash.add(name);
  hash.add(dtype_name(tensor.dtype));
  for (const std::uint64_t size : tensor.shape) hash.add(cat(size));
  hash.add("data");
  hash.add(tensor.data.data(), tensor.data.size());
  tensors_.emplace(name, hash.finish());
  return true;
}

Fingerprint ModelHash::finish(const ModelConfig& config) const {
  Hash hash;
  hash.add("infemeral model fingerprint v1");
  hash.add(canonical_text(config));
  for (const auto& [name, fingerprint] : tensors_) hash.add(fingerprint.data(), fingerprint.size());
  return hash.finish();
}

}  // namespace infemeral
