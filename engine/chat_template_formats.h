// The prompt formats that the engine writes, and which of them a chat template is.
#pragma once

#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace infemeral {

// [INST] and what stands around it: questions and answers take turns, and an answer ends with the
// model's end token.
struct InstructStyle {
  enum class System {
    kNone,   // no system message
    kFirst,  // before the first question, with an empty line
    kLast,   // before the last message, if that is a question, with an empty line
    kTags,   // before the first question, in <<SYS>>
  };
  std::string_view before_question = "[INST] ";
  std::string_view after_question = " [/INST]";
  std::string_view before_answer = {};
  std::string_view before_end = {};  // between an answer and the end token
  std::string_view after_end = {};
  System system = System::kNone;
  bool strip_questions = false;
  bool strip_answers = false;
  bool begin_each = false;  // the begin token stands before every question, not once
};

struct ChatFormat {
  enum class Family { kChatMl, kQwen3, kLlama3, kInstruct };
  Family family = Family::kChatMl;
  std::string default_system;    // ChatML: said when the first message is no system message
  bool dates = false;            // Llama 3.1 and later
  bool always_generate = false;  // the first Llama 3 template prompts for an answer always
  const InstructStyle* instruct = nullptr;
};

// The format whose text is that of the template for every chat of plain messages that the template
// takes. Unimplemented, with the reason, where it is none.
absl::StatusOr<ChatFormat> recognise_chat_format(std::string_view jinja);

}  // namespace infemeral
