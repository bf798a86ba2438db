#include "engine/chat_template.h"

#include <algorithm>
#include <exception>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "engine/tokenizer_json.h"
#include "engine/tokenizer_unicode.h"

namespace infemeral {
namespace {

bool contains(std::string_view text, std::string_view part) {
  return text.find(part) != std::string_view::npos;
}

// Python's str.strip() and rstrip(): White_Space and the four separators of ASCII.
bool is_python_space(char32_t c) {
  return tok::is_white_space(c) || (c >= 0x1C && c <= 0x1F);
}

std::string_view trim_right(std::string_view text) {
  std::size_t end = 0;
  for (std::size_t pos = 0; pos < text.size();) {
    if (!is_python_space(tok::next_char(text, pos))) end = pos;
  }
  return text.substr(0, end);
}

std::string_view trim(std::string_view text) {
  text = trim_right(text);
  for (std::size_t pos = 0; pos < text.size();) {
    const std::size_t here = pos;
    if (!is_python_space(tok::next_char(text, pos))) return text.substr(here);
  }
  return {};
}

std::string_view trim_newlines(std::string_view text, bool left, bool right) {
  while (left && text.starts_with('\n')) text.remove_prefix(1);
  while (right && text.ends_with('\n')) text.remove_suffix(1);
  return text;
}

std::string_view before_first(std::string_view text, std::string_view mark) {
  return text.substr(0, text.find(mark));
}

std::string_view after_last(std::string_view text, std::string_view mark) {
  const std::size_t found = text.rfind(mark);
  return found == std::string_view::npos ? text : text.substr(found + mark.size());
}

// "bos_token" or "eos_token": its text, or an object that has it. "" when there is none.
std::string read_token(const nlohmann::json& config, const char* name) {
  if (tok::is_null(config, name)) return "";
  const nlohmann::json& token = config[name];
  if (token.is_object()) return tok::string_member(token, "content", name);
  return tok::string_member(config, name, "tokenizer_config.json");
}

// "chat_template" is the program, or a list of named ones. "" when there is none.
std::string read_template(const nlohmann::json& config) {
  if (tok::is_null(config, "chat_template")) return "";
  const nlohmann::json& value = config["chat_template"];
  if (!value.is_array())
    return tok::string_member(config, "chat_template", "tokenizer_config.json");
  for (const nlohmann::json& entry : value) {
    if (tok::string_member(entry, "name", "chat_template") == "default") {
      return tok::string_member(entry, "template", "chat_template");
    }
  }
  return "";
}

absl::Status in_file(const std::filesystem::path& file, const absl::Status& status) {
  return absl::Status(status.code(), absl::StrCat(file.string(), ": ", status.message()));
}

absl::Status no_template() {
  return absl::FailedPreconditionError(
      "the model has no chat template: it is not a chat model, or its tokenizer_config.json is "
      "incomplete");
}

}  // namespace

// Collects parts; neighbours of one kind become one.
class ChatTemplate::Writer {
 public:
  void markup(std::string_view text) { add(text, true); }
  void content(std::string_view text) { add(text, false); }
  std::vector<Part> take() { return std::move(parts_); }

 private:
  void add(std::string_view text, bool is_markup) {
    if (text.empty()) return;
    if (parts_.empty() || parts_.back().markup != is_markup) parts_.push_back({"", is_markup});
    parts_.back().text += text;
  }
  std::vector<Part> parts_;
};

absl::StatusOr<ChatTemplate::Config> ChatTemplate::read_config(std::string_view json) {
  try {
    const nlohmann::json config = tok::parse_document(json);
    return Config{read_template(config), read_token(config, "bos_token"),
                  read_token(config, "eos_token")};
  } catch (const tok::LoadError& error) {
    return error.status();
  } catch (const std::exception& error) {
    return absl::InvalidArgumentError(absl::StrCat("not a tokenizer_config.json: ", error.what()));
  }
}

absl::StatusOr<ChatTemplate> ChatTemplate::parse(std::string_view json) {
  absl::StatusOr<Config> config = read_config(json);
  if (!config.ok()) return config.status();
  return recognise(config->jinja, *config);
}

absl::StatusOr<ChatTemplate> ChatTemplate::load(
    const std::filesystem::path& tokenizer_config_json) {
  const absl::StatusOr<std::string> text = tok::read_document(tokenizer_config_json);
  if (!text.ok()) return text.status();
  absl::StatusOr<Config> config = read_config(*text);
  if (!config.ok()) return in_file(tokenizer_config_json, config.status());

  // As in transformers, the file beside comes before the configuration's own template.
  const auto beside = tokenizer_config_json.parent_path() / "chat_template.jinja";
  const absl::StatusOr<std::string> jinja = tok::read_document(beside);
  if (!jinja.ok() && !absl::IsNotFound(jinja.status())) return jinja.status();
  absl::StatusOr<ChatTemplate> result = recognise(jinja.ok() ? *jinja : config->jinja, *config);
  if (!result.ok()) return in_file(jinja.ok() ? beside : tokenizer_config_json, result.status());
  return result;
}

absl::StatusOr<ChatTemplate> ChatTemplate::recognise(std::string_view jinja, Config config) {
  if (jinja.empty()) return no_template();
  absl::StatusOr<ChatFormat> format = recognise_chat_format(jinja);
  if (!format.ok()) return format.status();
  ChatTemplate result;
  result.format_ = *std::move(format);
  result.bos_token_ = std::move(config.bos_token);
  result.eos_token_ = std::move(config.eos_token);
  return result;
}

void ChatTemplate::write_chatml(std::span<const ChatMessage> messages, Writer& out) const {
  if (!format_.default_system.empty() && messages[0].role != "system") {
    out.markup(absl::StrCat("<|im_start|>system\n", format_.default_system, "<|im_end|>\n"));
  }
  for (const ChatMessage& message : messages) {
    out.markup(absl::StrCat("<|im_start|>", message.role, "\n"));
    out.content(message.content);
    out.markup("<|im_end|>\n");
  }
}

// Reasoning stays in the answers behind the last question only (a tool's result is no question).
void ChatTemplate::write_qwen3(std::span<const ChatMessage> messages, Writer& out) const {
  std::size_t last_query = messages.size() - 1;
  for (std::size_t i = messages.size(); i-- > 0;) {
    const std::string& content = messages[i].content;
    if (messages[i].role == "user" &&
        !(content.starts_with("<tool_response>") && content.ends_with("</tool_response>"))) {
      last_query = i;
      break;
    }
  }
  for (std::size_t i = 0; i < messages.size(); ++i) {
    out.markup(absl::StrCat("<|im_start|>", messages[i].role, "\n"));
    std::string_view content = messages[i].content;
    if (messages[i].role == "assistant") {
      std::string_view reasoning;
      if (contains(content, "</think>")) {
        reasoning = trim_newlines(before_first(content, "</think>"), false, true);
        reasoning = trim_newlines(after_last(reasoning, "<think>"), true, false);
        content = trim_newlines(after_last(content, "</think>"), true, false);
      }
      if (i > last_query && (i + 1 == messages.size() || !reasoning.empty())) {
        out.markup("<think>\n");
        out.content(trim_newlines(reasoning, true, true));
        out.markup("\n</think>\n\n");
        content = trim_newlines(content, true, false);
      }
    }
    out.content(content);
    out.markup("<|im_end|>\n");
  }
}

void ChatTemplate::write_llama3(std::span<const ChatMessage> messages, Writer& out) const {
  const auto header = [&](std::string_view role) {
    out.markup("<|start_header_id|>");
    out.markup(role);
    out.markup("<|end_header_id|>\n\n");
  };
  out.markup(bos_token_);
  if (format_.dates) {
    header("system");
    out.markup("Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n");
    if (messages[0].role == "system") {
      out.content(trim(messages[0].content));
      messages = messages.subspan(1);
    }
    out.markup("<|eot_id|>");
  }
  for (const ChatMessage& message : messages) {
    header(message.role);
    out.content(trim(message.content));
    out.markup("<|eot_id|>");
  }
}

absl::Status ChatTemplate::write_instruct(std::span<const ChatMessage> messages,
                                          Writer& out) const {
  using System = InstructStyle::System;
  const InstructStyle& style = *format_.instruct;
  const ChatMessage* system = nullptr;
  if (messages[0].role == "system" && style.system != System::kNone) {
    system = messages.data();
    messages = messages.subspan(1);
  }
  if (!style.begin_each) out.markup(bos_token_);
  for (std::size_t i = 0; i < messages.size(); ++i) {
    const bool question = i % 2 == 0;
    if (messages[i].role != (question ? "user" : "assistant")) {
      return absl::InvalidArgumentError(
          absl::StrCat("the model's chat template takes user and assistant messages in turns, ",
                       style.system == System::kNone ? "without a system message"
                                                     : "behind at most one system message"));
    }
    std::string_view content = messages[i].content;
    if (!question) {
      out.markup(style.before_answer);
      out.content(style.strip_answers ? trim(content) : content);
      out.markup(style.before_end);
      out.markup(eos_token_);
      out.markup(style.after_end);
      continue;
    }
    if (style.begin_each) out.markup(bos_token_);
    out.markup(style.before_question);
    const bool has_system =
        system != nullptr && i == (style.system == System::kLast ? messages.size() - 1 : 0);
    if (has_system && style.system == System::kTags) {
      // Stripped together with the question, of which nothing may be left.
      content = trim_right(content);
      out.markup("<<SYS>>\n");
      out.content(system->content);
      out.markup(content.empty() ? "\n<</SYS>>" : "\n<</SYS>>\n\n");
    } else {
      if (has_system) {
        out.content(system->content);
        out.markup("\n\n");
      }
      if (style.strip_questions) content = trim(content);
    }
    out.content(content);
    out.markup(style.after_question);
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<ChatTemplate::Part>> ChatTemplate::parts(
    std::span<const ChatMessage> messages, bool add_generation_prompt) const {
  if (messages.empty()) return absl::InvalidArgumentError("a chat needs at least one message");
  std::vector<ChatMessage> valid(messages.begin(), messages.end());
  for (std::size_t i = 0; i < valid.size(); ++i) {
    const std::string& role = valid[i].role;
    if (role != "system" && role != "user" && role != "assistant") {
      return absl::InvalidArgumentError(absl::StrCat(
          "message ", i, " has the role ", tok::shown(role), "; use system, user or assistant"));
    }
    std::string content;
    tok::Utf8Repair repair;
    repair.push(valid[i].content, content);
    repair.finish(content);
    valid[i].content = std::move(content);
  }
  Writer out;
  const bool generate = add_generation_prompt || format_.always_generate;
  switch (format_.family) {
    case ChatFormat::Family::kChatMl:
      write_chatml(valid, out);
      if (generate) out.markup("<|im_start|>assistant\n");
      break;
    case ChatFormat::Family::kQwen3:
      write_qwen3(valid, out);
      if (generate) out.markup("<|im_start|>assistant\n");
      break;
    case ChatFormat::Family::kLlama3:
      write_llama3(valid, out);
      if (generate) out.markup("<|start_header_id|>assistant<|end_header_id|>\n\n");
      break;
    case ChatFormat::Family::kInstruct:
      if (auto status = write_instruct(valid, out); !status.ok()) return status;
      break;
  }
  return out.take();
}

absl::StatusOr<std::vector<std::int32_t>> ChatTemplate::encode(
    const Tokenizer& tokenizer, std::span<const ChatMessage> messages,
    bool add_generation_prompt) const {
  const absl::StatusOr<std::vector<Part>> written = parts(messages, add_generation_prompt);
  if (!written.ok()) return written.status();
  std::vector<Tokenizer::Segment> segments;
  for (const Part& part : *written) segments.push_back({part.text, part.markup});
  return tokenizer.encode_segments(segments, /*add_special_tokens=*/false);
}

absl::StatusOr<std::string> ChatTemplate::render(std::span<const ChatMessage> messages,
                                                 bool add_generation_prompt) const {
  const absl::StatusOr<std::vector<Part>> written = parts(messages, add_generation_prompt);
  if (!written.ok()) return written.status();
  std::string text;
  for (const Part& part : *written) text += part.text;
  return text;
}

std::string_view ChatTemplate::end_of_turn() const {
  switch (format_.family) {
    case ChatFormat::Family::kChatMl:
    case ChatFormat::Family::kQwen3:
      return "<|im_end|>";
    case ChatFormat::Family::kLlama3:
      return "<|eot_id|>";
    case ChatFormat::Family::kInstruct:
      break;
  }
  return "";
}

}  // namespace infemeral
