#include "engine/generation_config.h"

#include <limits>
#include <nlohmann/json.hpp>

#include "engine/json_file.h"
#include "engine/text.h"

namespace infemeral {
namespace {

using Json = nlohmann::json;
constexpr char kFile[] = "generation_config.json";

absl::Status read_number(const Json& json, const char* name, float& value) {
  const auto field = json.find(name);
  if (field == json.end() || field->is_null()) return absl::OkStatus();
  if (!field->is_number()) {
    return absl::InvalidArgumentError(cat(kFile, ": ", name, " is not a number"));
  }
  value = field->get<float>();
  return absl::OkStatus();
}

absl::Status read_end_tokens(const Json& json, std::vector<std::int32_t>& tokens) {
  const auto field = json.find("eos_token_id");
  if (field == json.end() || field->is_null()) return absl::OkStatus();
  const Json list = field->is_array() ? *field : Json::array({*field});
  for (const Json& id : list) {
    if (!id.is_number_unsigned() ||
        id.get<std::uint64_t>() > std::numeric_limits<std::int32_t>::max()) {
      return absl::InvalidArgumentError(
          cat(kFile, ": eos_token_id is neither a token id nor a list of token ids"));
    }
    tokens.push_back(id.get<std::int32_t>());
  }
  return absl::OkStatus();
}

bool is_top_k(float k) {
  return k >= 0 && k < 1e9f;
}

}  // namespace

absl::StatusOr<GenerationConfig> parse_generation_config(std::string_view text) {
  auto parsed = parse_json(text, kFile);
  if (!parsed.ok()) return parsed.status();
  const Json& json = *parsed;
  if (!json.is_object()) {
    return absl::InvalidArgumentError(cat(kFile, " is not a JSON object"));
  }
  GenerationConfig config;
  if (auto status = read_end_tokens(json, config.end_tokens); !status.ok()) return status;

  SamplingParams& sampling = config.sampling;
  const auto do_sample = json.find("do_sample");
  const bool samples = do_sample != json.end() && do_sample->is_boolean() && do_sample->get<bool>();
  float top_k = 50;  // Hugging Face's default when the file says nothing; null is off
  if (const auto field = json.find("top_k"); field != json.end() && field->is_null()) top_k = 0;
  sampling.temperature = 1;
  for (auto [name, value] : {std::pair<const char*, float*>{"temperature", &sampling.temperature},
                             {"top_k", &top_k},
                             {"top_p", &sampling.top_p},
                             {"min_p", &sampling.min_p},
                             {"repetition_penalty", &sampling.repetition_penalty}}) {
    if (auto status = read_number(json, name, *value); !status.ok()) return status;
  }
  if (top_k == -1) top_k = 0;  // off, as many files say it
  if (!samples) {
    // The filters wait for a caller who asks for a temperature, as in generate(do_sample=True).
    // Nobody has tried them, so one that means nothing is off instead of an error.
    sampling.temperature = 0;
    if (!is_top_k(top_k)) top_k = 0;
    if (!validate({.top_p = sampling.top_p}).ok()) sampling.top_p = 1;
    if (!validate({.min_p = sampling.min_p}).ok()) sampling.min_p = 0;
  }
  if (!is_top_k(top_k)) {
    return absl::InvalidArgumentError(cat(kFile, ": top_k is out of range"));
  }
  sampling.top_k = static_cast<int>(top_k);
  if (auto status = validate(sampling); !status.ok()) {
    return absl::InvalidArgumentError(cat(kFile, ": ", status.message()));
  }
  return config;
}

absl::StatusOr<GenerationConfig> load_generation_config(const std::filesystem::path& folder) {
  const std::filesystem::path file = folder / kFile;
  std::error_code error;
  if (!std::filesystem::exists(file, error)) return parse_generation_config("{}");
  auto text = read_text_file(file, 1 << 20);
  if (!text.ok()) return text.status();
  return parse_generation_config(*text);
}

}  // namespace infemeral
