// The fingerprint of a model: what it is, apart from how it is stored in files.
#pragma once

#include <map>
#include <string>
#include <string_view>

#include "engine/link.h"
#include "engine/model_config.h"
#include "engine/safetensors.h"

namespace infemeral {

// BLAKE2b-256 over the configuration and, in the order of their names, each tensor's own
// BLAKE2b-256 (over name, dtype, shape and bytes). Tensors can be added in any order; adding one
// again does nothing, so that each is read once, when its bytes are at hand.
class ModelHash {
 public:
  bool add(std::string_view name, const TensorView& tensor);  // false when it was there already
  Fingerprint finish(const ModelConfig& config) const;

 private:
  std::map<std::string, Fingerprint, std::less<>> tensors_;
};

}  // namespace infemeral
