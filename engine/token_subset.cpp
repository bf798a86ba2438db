#include "engine/token_subset.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "engine/json_file.h"
#include "engine/text.h"

namespace infemeral {
namespace {

using nlohmann::json;

constexpr int kFormatVersion = 1;
constexpr char kName[] = "subset.json";
constexpr std::size_t kMaxBytes = 64 << 20;  // ids of a vocabulary of five million

std::string how_to_make(const std::filesystem::path& client_folder, std::string_view force) {
  return cat("engine_prep --output ", client_folder.string(), " --token-counts TEXT_FILE", force);
}

absl::Status damaged(const std::filesystem::path& client_folder, std::string_view text) {
  return absl::DataLossError(cat((client_folder / kName).string(), ": ", text,
                                 "; make it again with ", how_to_make(client_folder, " --force")));
}

absl::StatusOr<std::vector<std::int32_t>> read_subset(const json& root,
                                                      const ClientManifest& manifest,
                                                      const std::filesystem::path& folder) {
  const auto mismatch = [&folder](const auto&... text) {
    return absl::FailedPreconditionError(cat((folder / kName).string(), text...,
                                             "; make it again with ",
                                             how_to_make(folder, " --force")));
  };
  if (!root.is_object()) return damaged(folder, "not a JSON object");
  if (!root.at("format_version").is_number_integer()) {
    return damaged(folder, "format_version is not a number");
  }
  if (root["format_version"] != kFormatVersion) {
    return mismatch(" has the format version ", root["format_version"].dump(),
                    "; this program reads version ", kFormatVersion);
  }
  const auto fingerprint = parse_fingerprint(root.at("model_fingerprint").get<std::string>());
  if (!fingerprint) return damaged(folder, "model_fingerprint is not 64 hexadecimal digits");
  if (*fingerprint != manifest.model_fingerprint) return mismatch(" was made for another model");
  if (root.at("vocab_size") != manifest.vocab_size) {
    return damaged(folder, cat("vocab_size is not the model's ", manifest.vocab_size));
  }
  const json& list = root.at("ids");
  if (!list.is_array() || list.empty()) return damaged(folder, "ids is not a list with an id");
  if (root.at("count") != list.size()) return damaged(folder, "count is not the number of ids");

  std::vector<std::int32_t> ids;
  ids.reserve(list.size());
  for (const json& id : list) {
    if (!id.is_number_unsigned() || id.get<std::uint64_t>() >= manifest.vocab_size) {
      return damaged(folder, cat("ids holds something that is no id below ", manifest.vocab_size));
    }
    const auto value = id.get<std::int32_t>();
    if (!ids.empty() && value <= ids.back()) {
      return damaged(folder, "ids are not ascending, each once");
    }
    ids.push_back(value);
  }
  return ids;
}

}  // namespace

std::vector<std::int32_t> most_frequent_tokens(std::span<const std::int32_t> text,
                                               std::span<const std::int32_t> always,
                                               std::size_t vocab_size, std::size_t size) {
  struct Count {
    bool always = false;
    std::size_t seen = 0;
    std::int32_t id = 0;
  };
  std::vector<Count> counts(vocab_size);
  for (std::size_t i = 0; i < vocab_size; ++i) counts[i].id = static_cast<std::int32_t>(i);
  for (std::int32_t id : text) {
    if (static_cast<std::size_t>(id) < vocab_size) ++counts[static_cast<std::size_t>(id)].seen;
  }
  std::size_t forced = 0;
  for (std::int32_t id : always) {
    if (static_cast<std::size_t>(id) >= vocab_size) continue;
    Count& count = counts[static_cast<std::size_t>(id)];
    forced += !count.always;
    count.always = true;
  }
  const std::size_t kept = std::min(vocab_size, std::max(size, forced));
  std::partial_sort(counts.begin(), counts.begin() + static_cast<std::ptrdiff_t>(kept),
                    counts.end(), [](const Count& a, const Count& b) {
                      if (a.always != b.always) return a.always;
                      return a.seen != b.seen ? a.seen > b.seen : a.id < b.id;
                    });
  std::vector<std::int32_t> ids;
  for (std::size_t i = 0; i < kept; ++i) ids.push_back(counts[i].id);
  std::sort(ids.begin(), ids.end());
  return ids;
}

absl::StatusOr<TokenSubset> count_tokens(const Tokenizer& tokenizer,
                                         std::span<const std::int32_t> end_tokens,
                                         std::string_view text, std::size_t vocab_size,
                                         std::size_t size) {
  if (size == 0) return absl::InvalidArgumentError("a subset must have at least one token");
  const auto encoded = tokenizer.encode(text, {.add_special_tokens = false});
  if (!encoded.ok()) return encoded.status();
  if (encoded->empty()) return absl::InvalidArgumentError("the text holds no token to count");

  std::vector<std::int32_t> always(end_tokens.begin(), end_tokens.end());
  for (std::size_t i = 0; i < tokenizer.vocab_size(); ++i) {
    const auto id = static_cast<std::int32_t>(i);
    if (tokenizer.is_special(id)) always.push_back(id);
  }
  TokenSubset subset{.ids = most_frequent_tokens(*encoded, always, vocab_size, size),
                     .text_tokens = encoded->size()};
  for (std::int32_t id : *encoded) {
    subset.covered += std::binary_search(subset.ids.begin(), subset.ids.end(), id);
  }
  return subset;
}

absl::Status save_token_subset(std::span<const std::int32_t> ids, const ClientManifest& manifest,
                               const std::filesystem::path& client_folder) {
  try {
    const nlohmann::ordered_json root = {
        {"format_version", kFormatVersion},
        {"model_fingerprint", fingerprint_text(manifest.model_fingerprint)},
        {"vocab_size", manifest.vocab_size},
        {"count", ids.size()},
        {"ids", std::vector<std::int32_t>(ids.begin(), ids.end())},
    };
    return replace_file(client_folder / kName, root.dump() + "\n");
  } catch (const std::exception& e) {
    return absl::InternalError(cat("cannot write ", kName, ": ", e.what()));
  }
}

absl::StatusOr<std::vector<std::int32_t>> load_token_subset(
    const ClientManifest& manifest, const std::filesystem::path& client_folder) {
  const auto text = read_text_file(client_folder / kName, kMaxBytes);
  if (absl::IsNotFound(text.status())) {
    return absl::NotFoundError(cat(client_folder.string(),
                                   " holds no token counts for the subset head; make them with ",
                                   how_to_make(client_folder, "")));
  }
  if (!text.ok()) return text.status();
  const auto root = parse_json(*text, kName);
  if (!root.ok()) return damaged(client_folder, "not valid JSON");
  try {
    return read_subset(*root, manifest, client_folder);
  } catch (const std::exception&) {
    // nlohmann's words speak of types and brackets; a missing field or a wrong type is all it is.
    return damaged(client_folder, "a field is missing or has the wrong type");
  }
}

}  // namespace infemeral
