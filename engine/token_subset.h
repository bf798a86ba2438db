// The tokens that the subset head scores (engine/subset_head.h): the most frequent ones of a text
// that the user chose. They lie in the client's folder as subset.json:
//
//   format_version       1
//   model_fingerprint    of the folder that the subset was made for
//   vocab_size           V
//   count                n, from 1 to V
//   ids                  n ids below V, ascending
//
// The ids hold no text, but they say something about it: the file stays with the client.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/client_folder.h"
#include "engine/tokenizer.h"

namespace infemeral {

// `size` ids below vocab_size, ascending: all of `always`, then the most frequent of `text`. Of
// equally frequent tokens the lowest ids: where the text has too few different ones they fill up,
// and a BPE vocabulary begins with its most useful merges. More than `size` when `always` is, fewer
// when the vocabulary is smaller. Ids outside the vocabulary are left out.
std::vector<std::int32_t> most_frequent_tokens(std::span<const std::int32_t> text,
                                               std::span<const std::int32_t> always,
                                               std::size_t vocab_size, std::size_t size);

struct TokenSubset {
  std::vector<std::int32_t> ids;  // ascending
  std::size_t text_tokens = 0;    // of the text that was counted
  std::size_t covered = 0;        // of these, tokens that are in the subset
};

// Tokenises the text as plain text and counts; every special token and every end token belongs to
// the subset whether the text has it or not: texts are made of neither, but each answer needs them.
// InvalidArgument when there is nothing to count; the errors of Tokenizer::encode.
absl::StatusOr<TokenSubset> count_tokens(const Tokenizer& tokenizer,
                                         std::span<const std::int32_t> end_tokens,
                                         std::string_view text, std::size_t vocab_size,
                                         std::size_t size);

// Replaces the folder's subset.json as a whole.
absl::Status save_token_subset(std::span<const std::int32_t> ids, const ClientManifest& manifest,
                               const std::filesystem::path& client_folder);

// The ids, all checked. NotFound when the folder has no subset.json, FailedPrecondition when it
// belongs to another model or format version, DataLoss when it is damaged; each says how to make
// the file.
absl::StatusOr<std::vector<std::int32_t>> load_token_subset(
    const ClientManifest& manifest, const std::filesystem::path& client_folder);

}  // namespace infemeral
