// The model's own defaults for generation, from Hugging Face's generation_config.json.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/sampling.h"

namespace infemeral {

struct GenerationConfig {
  std::vector<std::int32_t> end_tokens;  // eos_token_id: a number or a list
  SamplingParams sampling;  // greedy unless the file says do_sample: true, as in Hugging Face
};

// InvalidArgument, naming the field, for a value that cannot be used. Fields that the engine does
// not know are ignored: the file is the model's, not the user's.
absl::StatusOr<GenerationConfig> parse_generation_config(std::string_view json);
// A folder without the file gets the defaults: greedy, no end token.
absl::StatusOr<GenerationConfig> load_generation_config(const std::filesystem::path& folder);

}  // namespace infemeral
