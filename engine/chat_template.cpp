#include "engine/chat_template.h"

#include <algorithm>
#include <exception>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "engine/tokenizer_json.h"
#include "engine/tokenizer_unicode.h"

namespace infemeral {
namespace {

constexpr std::string_view kStart = "<|im_start|>";
constexpr std::string_view kEnd = "<|im_end|>";

bool contains(std::string_view text, std::string_view part) {
  return text.find(part) != std::string_view::npos;
}

// Python's str.strip(): White_Space and the four separators of ASCII.
bool is_python_space(char32_t c) {
  return tok::is_white_space(c) || (c >= 0x1C && c <= 0x1F);
}

std::string_view trim(std::string_view text) {
  std::size_t begin = text.size(), end = 0;
  for (std::size_t pos = 0; pos < text.size();) {
    const std::size_t here = pos;
    if (is_python_space(tok::next_char(text, pos))) continue;
    begin = std::min(begin, here);
    end = pos;
  }
  return begin < end ? text.substr(begin, end - begin) : std::string_view();
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

absl::Status unknown_template(std::string_view why) {
  return absl::UnimplementedError(
      absl::StrCat("the chat template is not one of ChatML, Qwen3 or Llama 3 (", std::string(why),
                   "); format the prompt yourself and send it as plain text"));
}

// The literal that a ChatML template says as the system message by default, "" for none. Branches
// that put the caller's text there have a quotation mark behind the newline.
absl::StatusOr<std::string> default_system(std::string_view jinja) {
  const std::string opening = absl::StrCat("<|im_start|>", "system\n");
  for (std::size_t pos = 0; (pos = jinja.find(opening, pos)) != std::string_view::npos;) {
    pos += opening.size();
    const std::string_view text = before_first(jinja.substr(pos), kEnd);
    if (text.empty() || text[0] == '\'' || text[0] == '"') continue;
    if (contains(text, "\\") || contains(text, "{") || contains(text, "'") ||
        pos + text.size() == jinja.size()) {
      return unknown_template("its default system message is not a plain string");
    }
    return std::string(text);
  }
  return std::string();
}

std::string read_bos(const nlohmann::json& config) {
  if (tok::is_null(config, "bos_token")) return "";
  const nlohmann::json& bos = config["bos_token"];
  if (bos.is_object()) return tok::string_member(bos, "content", "bos_token");
  return tok::string_member(config, "bos_token", "tokenizer_config.json");
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

struct Config {
  std::string jinja;
  std::string bos_token;
};

absl::StatusOr<Config> read_config(std::string_view json) {
  try {
    const nlohmann::json config = tok::parse_document(json);
    return Config{read_template(config), read_bos(config)};
  } catch (const tok::LoadError& error) {
    return error.status();
  } catch (const std::exception& error) {
    return absl::InvalidArgumentError(absl::StrCat("not a tokenizer_config.json: ", error.what()));
  }
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

absl::StatusOr<ChatTemplate> ChatTemplate::parse(std::string_view json) {
  absl::StatusOr<Config> config = read_config(json);
  if (!config.ok()) return config.status();
  return recognise(config->jinja, std::move(config->bos_token));
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
  absl::StatusOr<ChatTemplate> result =
      recognise(jinja.ok() ? *jinja : config->jinja, std::move(config->bos_token));
  if (!result.ok()) return in_file(jinja.ok() ? beside : tokenizer_config_json, result.status());
  return result;
}

// By the marks that tell the formats apart, and against those that say that a template does more.
absl::StatusOr<ChatTemplate> ChatTemplate::recognise(std::string_view source,
                                                     std::string bos_token) {
  if (source.empty()) return no_template();
  // A newline in a Jinja string is written as itself or escaped.
  const std::string jinja = absl::StrReplaceAll(std::string(source), {{"\\n", "\n"}});
  ChatTemplate result;
  result.bos_token_ = std::move(bos_token);
  const bool has_flag = contains(jinja, "add_generation_prompt");

  if (contains(jinja, "<|start_header_id|>") && contains(jinja, "<|eot_id|>")) {
    if (!contains(jinja, "bos_token") || !contains(jinja, "trim") ||
        !contains(jinja, "<|end_header_id|>\n\n")) {
      return unknown_template("it only resembles Llama 3");
    }
    result.format_ = Format::kLlama3;
    result.dates_ = contains(jinja, "Cutting Knowledge Date: December 2023\n");
    if (!result.dates_ && contains(jinja, "Date")) {
      return unknown_template("it resembles Llama 3 with other dates");
    }
    result.always_generate_ = !has_flag;
    return result;
  }

  if (!contains(jinja, kStart) || !contains(jinja, kEnd)) {
    return unknown_template("it has the marks of none");
  }
  if (!has_flag || contains(jinja, "bos_token") || contains(jinja, "trim") ||
      contains(jinja, ".strip()") || contains(jinja, "<|im_start|>assistant\n<think>")) {
    return unknown_template("it only resembles ChatML");
  }
  if (contains(jinja, "think>")) {
    if (!contains(jinja, "last_query_index") || !contains(jinja, "reasoning_content")) {
      return unknown_template("it resembles ChatML with reasoning of its own kind");
    }
    result.format_ = Format::kQwen3;
  }
  absl::StatusOr<std::string> system = default_system(jinja);
  if (!system.ok()) return system.status();
  result.default_system_ = *std::move(system);
  return result;
}

void ChatTemplate::write_chatml(std::span<const ChatMessage> messages, Writer& out) const {
  if (!default_system_.empty() && messages[0].role != "system") {
    out.markup(absl::StrCat("<|im_start|>system\n", default_system_, "<|im_end|>\n"));
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
  if (dates_) {
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
  switch (format_) {
    case Format::kChatMl:
      write_chatml(valid, out);
      break;
    case Format::kQwen3:
      write_qwen3(valid, out);
      break;
    case Format::kLlama3:
      write_llama3(valid, out);
      break;
  }
  if (add_generation_prompt || always_generate_) {
    out.markup(format_ == Format::kLlama3 ? "<|start_header_id|>assistant<|end_header_id|>\n\n"
                                          : "<|im_start|>assistant\n");
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
  switch (format_) {
    case Format::kChatMl:
    case Format::kQwen3:
      return kEnd;
    case Format::kLlama3:
      return "<|eot_id|>";
  }
  return "";
}

}  // namespace infemeral
