// The items of a batch: where prompts come from and where results go.
//
// Three kinds of input file: plain text, one prompt a line; JSON lines with "prompt" or "messages";
// OpenAI batch lines with "custom_id", "url" and "body". Results are JSON lines, in OpenAI's batch
// format for items that came in it.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/chat_template.h"
#include "engine/sampling.h"
#include "engine/text_generation.h"

namespace infemeral {

// What an item says about its own generation; unset fields come from the command line.
struct ItemOptions {
  std::optional<std::uint32_t> max_tokens;
  std::optional<float> temperature;
  std::optional<int> top_k;
  std::optional<float> top_p;
  std::optional<float> min_p;
  std::optional<float> repetition_penalty;
  std::optional<std::uint64_t> seed;
  std::vector<std::string> stop;
};

struct BatchItem {
  enum class Kind { kPlain, kOpenAiChat, kOpenAiCompletion };
  std::size_t index = 0;  // counts from 0 over the whole input
  Kind kind = Kind::kPlain;
  std::string id;                     // "id" or "custom_id"; may be empty
  std::string prompt;                 // used when there are no messages
  std::vector<ChatMessage> messages;  // through the chat template
  ItemOptions options;
  absl::Status status;  // why this item cannot be run; it gets a result line all the same
};

// Reads a whole input file ("-" is standard input), which must be UTF-8 without NUL bytes. An error
// here means that nothing can be run; a bad line becomes an item with its own error.
absl::StatusOr<std::vector<BatchItem>> read_batch(const std::string& file);
// The same from text, for tests; `name` decides nothing but a .jsonl ending.
std::vector<BatchItem> parse_batch(std::string_view text, std::string_view name);

// What the output file of an earlier run over the same items holds.
struct EarlierResults {
  std::vector<bool> finished;  // of each item: has a line
  std::size_t n_finished = 0;
  std::uint64_t bytes = 0;  // of the file's whole lines
  bool unended = false;     // the last one lacks its newline; nothing else of it
};

// Reads a file's contents. A last line that was cut off does not count. InvalidArgument, with the
// line's number, when a line is no result of one of these items.
absl::StatusOr<EarlierResults> read_results(std::string_view text,
                                            const std::vector<BatchItem>& items);

// One result line, without the newline.
std::string result_line(const BatchItem& item, std::string_view model, std::size_t prompt_tokens,
                        const TextResult& result, const absl::Status& status);

}  // namespace infemeral
