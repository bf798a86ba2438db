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
  // As in Hugging Face: greedy unless the file says do_sample: true. The filters are the file's,
  // and top_k 50 where it names none, in either case: they count once a caller sets a temperature.
  SamplingParams sampling;
};

// InvalidArgument, naming the field, for a value that cannot be used; a filter that is out of range
// is off where the file is greedy. Fields that the engine does not know are ignored: the file is
// the model's, not the user's.
absl::StatusOr<GenerationConfig> parse_generation_config(std::string_view json);
// A folder without the file gets the defaults: greedy, no end token.
absl::StatusOr<GenerationConfig> load_generation_config(const std::filesystem::path& folder);

}  // namespace infemeral
