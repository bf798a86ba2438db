// Text in, text out: the pipeline between a tokenizer and a streaming detokenizer.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <stop_token>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/chat_template.h"
#include "engine/generation_config.h"
#include "engine/pipeline.h"
#include "engine/tokenizer.h"

namespace infemeral {

// What turns text into ids and back, from the client's folder. Immutable; readable from any thread.
struct TextAssets {
  static absl::StatusOr<TextAssets> load(const std::filesystem::path& client_folder);

  // The prompt's ids: with the model's begin token where its tokenizer adds one. Text that looks
  // like a special token stays text.
  absl::StatusOr<std::vector<std::int32_t>> encode_prompt(std::string_view prompt) const;
  // Through the model's chat template, ready for the assistant's turn. Errors: those of
  // ChatTemplate::load for a model without a template that the engine knows, and of its encode.
  absl::StatusOr<std::vector<std::int32_t>> encode_chat(
      std::span<const ChatMessage> messages) const;

  std::unique_ptr<const Tokenizer> tokenizer;
  absl::StatusOr<ChatTemplate> chat_template = absl::UnknownError("not loaded");
  GenerationConfig defaults;
  // What ends a turn of the model's chats, where that is a token.
  std::optional<std::int32_t> end_of_turn;
};

// Cuts a stream of text at the first of several stop strings, holding back what might become one.
class StopFilter {
 public:
  // Empty stop strings are ignored.
  explicit StopFilter(std::vector<std::string> stops);

  // The text that can be shown now. After stopped(), always empty.
  std::string push(std::string_view text);
  // What was held back, when the stream ends without a stop string.
  std::string finish();
  bool stopped() const { return stopped_; }

 private:
  std::vector<std::string> stops_;
  std::string held_;
  bool stopped_ = false;
};

struct TextRequest {
  std::vector<std::int32_t> prompt;
  std::uint32_t max_tokens = 128;
  SamplingParams sampling;
  std::vector<std::string> stop;   // a special token's name means that token, too
  bool ignore_end_tokens = false;  // the model's own, not those in `stop`
};

struct TextResult {
  std::string text;      // without the stop string, special tokens left out
  bool stopped = false;  // by an end token or a stop string; else by the length
  GenerateResult generation;
};

// Called with every piece of text as soon as it is certain; pieces are whole UTF-8 characters and
// their concatenation is TextResult::text.
using TextCallback = std::function<void(std::string_view piece)>;

// A text that is being generated: the job for Pipeline::generate_all, and what comes of it. Neither
// copied nor moved, since the job points into it.
class TextJob {
 public:
  // `assets` is borrowed until the job has ended.
  TextJob(const TextAssets& assets, TextRequest request, TextCallback on_text);
  TextJob(const TextJob&) = delete;
  TextJob& operator=(const TextJob&) = delete;

  GenerateJob job;
  TextResult result;  // complete after finish()

  // Once the job has ended, well or badly: shows what was held back.
  void finish();

 private:
  bool push(std::int32_t token);
  void show(std::string piece);

  StreamDecoder decoder_;
  StopFilter filter_;
  const TextCallback on_text_;
};

// On an error, `result` holds what was made before it. Errors: those of Pipeline::generate.
absl::Status generate_text(Pipeline& pipeline, const TextAssets& assets, const TextRequest& request,
                           const TextCallback& on_text, std::stop_token stop, TextResult& result);

}  // namespace infemeral
