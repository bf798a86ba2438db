// The prompt format of a chat model, as its tokenizer_config.json gives it.
//
// The file holds a Jinja program. This is no Jinja interpreter: it recognises the formats below and
// writes them itself, so that what a user types can be told from the model's own markup. Tools and
// tool results are not covered.
//   ChatML    Qwen2, Qwen2.5, SmolLM2 and others, with the template's default system message
//   Qwen3     ChatML that cuts the reasoning out of earlier answers
//   Llama 3   also 3.1 to 3.3, whose system message carries dates; "Today Date" is the templates'
//             fallback, 26 Jul 2024, so that a prompt does not depend on the day
//   Mistral   -Instruct v0.1 to v0.3 and Nemo; [INST] is a control token from v0.3 on only, before
//             that a text that reads like it cannot be told from it, by this or any program
//   Llama 2   -chat, likewise
#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/chat_template_formats.h"
#include "engine/tokenizer.h"

namespace infemeral {

struct ChatMessage {
  std::string role;  // "system", "user" or "assistant"
  std::string content;
};

// Immutable; safe to share between threads.
class ChatTemplate {
 public:
  // NotFound: no such file; PermissionDenied, DataLoss: it cannot be read. FailedPrecondition: no
  // chat template in it. Unimplemented: a template of another format. InvalidArgument: not a
  // tokenizer_config.json. A chat_template.jinja beside the file, where newer models keep it, comes
  // before the file's own template; one that cannot be read is an error.
  static absl::StatusOr<ChatTemplate> load(const std::filesystem::path& tokenizer_config_json);
  static absl::StatusOr<ChatTemplate> parse(std::string_view json);

  // The prompt's token ids. Only the format's own markup becomes control tokens; text in a message
  // that reads like one stays text. InvalidArgument: no message, a role other than the three, or
  // an order of roles that the template refuses.
  absl::StatusOr<std::vector<std::int32_t>> encode(const Tokenizer& tokenizer,
                                                   std::span<const ChatMessage> messages,
                                                   bool add_generation_prompt) const;

  // The prompt as text, for people to look at: here markup and content cannot be told apart.
  absl::StatusOr<std::string> render(std::span<const ChatMessage> messages,
                                     bool add_generation_prompt) const;

  // The control token that ends a turn, the answer's too. Empty where it is the model's end token.
  std::string_view end_of_turn() const;

 private:
  struct Config {
    std::string jinja;
    std::string bos_token;
    std::string eos_token;
  };
  struct Part {
    std::string text;
    bool markup;
  };
  class Writer;

  static absl::StatusOr<Config> read_config(std::string_view json);
  static absl::StatusOr<ChatTemplate> recognise(std::string_view jinja, Config config);
  absl::StatusOr<std::vector<Part>> parts(std::span<const ChatMessage> messages,
                                          bool add_generation_prompt) const;
  void write_chatml(std::span<const ChatMessage> messages, Writer& out) const;
  void write_qwen3(std::span<const ChatMessage> messages, Writer& out) const;
  void write_llama3(std::span<const ChatMessage> messages, Writer& out) const;
  absl::Status write_instruct(std::span<const ChatMessage> messages, Writer& out) const;

  ChatFormat format_;
  std::string bos_token_;
  std::string eos_token_;
};

}  // namespace infemeral
