#include "tools/batch.h"

#include <charconv>
#include <cmath>
#include <ctime>
#include <limits>
#include <nlohmann/json.hpp>

#include "engine/json_file.h"
#include "engine/text.h"
#include "engine/tokenizer_unicode.h"

namespace infemeral {
namespace {

using Json = nlohmann::json;
using OrderedJson = nlohmann::ordered_json;

constexpr std::size_t kMaxInputBytes = std::size_t{1} << 30;

absl::Status bad_field(std::string_view name, std::string_view wanted) {
  return absl::InvalidArgumentError(cat("field ", quote_name(name), " must be ", wanted));
}

absl::Status read_number(const Json& value, std::string_view name, std::optional<float>& out) {
  if (!value.is_number()) return bad_field(name, "a number");
  out = value.get<float>();
  return absl::OkStatus();
}

template <typename Integer>
absl::Status read_integer(const Json& value, std::string_view name, std::optional<Integer>& out) {
  if (!value.is_number_unsigned() ||
      value.get<std::uint64_t>() >
          static_cast<std::uint64_t>(std::numeric_limits<Integer>::max())) {
    return bad_field(name, "a whole number that is not negative");
  }
  out = value.get<Integer>();
  return absl::OkStatus();
}

absl::Status read_stop(const Json& value, std::vector<std::string>& out) {
  const Json list = value.is_array() ? value : Json::array({value});
  for (const Json& stop : list) {
    if (!stop.is_string() || stop.get_ref<const std::string&>().empty()) {
      return bad_field("stop", "a string or a list of strings, none empty");
    }
    out.push_back(stop.get<std::string>());
  }
  return absl::OkStatus();
}

// A string, or OpenAI's list of parts that are texts.
std::optional<std::string> content_of(const Json& message) {
  const Json content = message.value("content", Json());
  if (content.is_string()) return content.get<std::string>();
  if (!content.is_array()) return std::nullopt;
  std::string text;
  for (const Json& part : content) {
    const bool is_text = part.is_object() && part.size() == 2 && part.contains("text") &&
                         part["text"].is_string() && part.value("type", Json()) == "text";
    if (!is_text) return std::nullopt;
    text += part["text"].get_ref<const std::string&>();
  }
  return text;
}

absl::Status read_messages(const Json& value, std::vector<ChatMessage>& out) {
  if (!value.is_array() || value.empty()) return bad_field("messages", "a list with a message");
  for (const Json& message : value) {
    const Json role = message.is_object() ? message.value("role", Json()) : Json();
    const auto content = role.is_string() ? content_of(message) : std::nullopt;
    if (!content || message.size() != 2) {
      return bad_field("messages",
                       "objects with \"role\" and \"content\", which are strings (content may be "
                       "a list of texts), and nothing else");
    }
    out.push_back({role.get<std::string>(), *content});
  }
  return absl::OkStatus();
}

// Fields of the OpenAI API that change nothing at the value given here.
bool is_neutral(const std::string& name, const Json& value) {
  if (name == "model" || name == "user" || name == "metadata" || name == "store") return true;
  if (name == "n" || name == "best_of") return value == 1;
  if (name == "stream" || name == "logprobs" || name == "echo") return value == false;
  if (name == "presence_penalty" || name == "frequency_penalty") return value == 0;
  if (name == "response_format") return value == Json{{"type", "text"}};
  return false;
}

absl::Status read_body(const Json& body, bool openai, BatchItem& item) {
  bool has_prompt = false;
  for (const auto& [name, value] : body.items()) {
    absl::Status status;
    ItemOptions& options = item.options;
    // Clients write what is not set as null.
    if (value.is_null() && (openai || name == "stop")) continue;
    if (name == "prompt") {
      if (!value.is_string()) return bad_field(name, "a string");
      item.prompt = value.get<std::string>();
      has_prompt = true;
    } else if (name == "messages") {
      status = read_messages(value, item.messages);
    } else if (name == "max_tokens" || name == "max_completion_tokens") {
      status = read_integer(value, name, options.max_tokens);
    } else if (name == "temperature") {
      status = read_number(value, name, options.temperature);
    } else if (name == "top_p") {
      status = read_number(value, name, options.top_p);
    } else if (name == "min_p") {
      status = read_number(value, name, options.min_p);
    } else if (name == "top_k") {
      status = read_integer(value, name, options.top_k);
    } else if (name == "repetition_penalty") {
      status = read_number(value, name, options.repetition_penalty);
    } else if (name == "seed") {
      status = read_integer(value, name, options.seed);
    } else if (name == "stop") {
      status = read_stop(value, options.stop);
    } else if (!openai && name == "id") {
      if (!value.is_string()) return bad_field(name, "a string");
      item.id = value.get<std::string>();
    } else if (!openai || !is_neutral(name, value)) {
      return absl::InvalidArgumentError(cat(
          "field ", quote_name(name), openai ? " is not supported at this value" : " is unknown"));
    }
    if (!status.ok()) return status;
  }
  if (has_prompt == !item.messages.empty()) {
    return absl::InvalidArgumentError("an item needs one of \"prompt\" and \"messages\"");
  }
  return absl::OkStatus();
}

absl::Status read_openai(const Json& line, BatchItem& item) {
  for (const auto& [name, value] : line.items()) {
    if (name != "custom_id" && name != "method" && name != "url" && name != "body") {
      return absl::InvalidArgumentError(cat("field ", quote_name(name), " is unknown"));
    }
  }
  if (!line["custom_id"].is_string()) return bad_field("custom_id", "a string");
  item.id = line["custom_id"].get<std::string>();
  if (line.value("method", Json("POST")) != "POST") return bad_field("method", "\"POST\"");
  const Json url = line.value("url", Json());
  if (url == "/v1/chat/completions") {
    item.kind = BatchItem::Kind::kOpenAiChat;
  } else if (url == "/v1/completions") {
    item.kind = BatchItem::Kind::kOpenAiCompletion;
  } else {
    return bad_field("url", "\"/v1/chat/completions\" or \"/v1/completions\"");
  }
  const auto body = line.find("body");
  if (body == line.end() || !body->is_object()) return bad_field("body", "an object");
  if (auto status = read_body(*body, /*openai=*/true, item); !status.ok()) return status;
  if ((item.kind == BatchItem::Kind::kOpenAiChat) != !item.messages.empty()) {
    return absl::InvalidArgumentError(
        "\"url\" and \"body\" do not fit: chat takes \"messages\", completions take \"prompt\"");
  }
  return absl::OkStatus();
}

absl::Status read_json_item(std::string_view text, BatchItem& item) {
  auto line = parse_json(text, "the line");
  // Not the parser's own words: they quote the line, and a prompt must not reach a log.
  if (!line.ok()) return absl::InvalidArgumentError("the line is not valid JSON");
  if (!line->is_object()) return absl::InvalidArgumentError("the line is not a JSON object");
  if (line->contains("custom_id")) {
    item.kind = BatchItem::Kind::kOpenAiChat;  // until the URL says otherwise
    return read_openai(*line, item);
  }
  return read_body(*line, /*openai=*/false, item);
}

const char* error_code(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kInvalidArgument:
      return "invalid_request";
    case absl::StatusCode::kUnimplemented:
      return "unsupported";
    case absl::StatusCode::kResourceExhausted:
      return "resource_exhausted";
    case absl::StatusCode::kDataLoss:
      return "damaged_data";
    default:
      return "engine_error";
  }
}

const char* finish_reason(const TextResult& result) {
  return result.stopped ? "stop" : "length";
}

// Generated text is UTF-8 already; prompts and ids may be anything.
std::string dump(const OrderedJson& json) {
  return json.dump(-1, ' ', false, OrderedJson::error_handler_t::replace);
}

std::string openai_line(const BatchItem& item, std::string_view model, std::size_t prompt_tokens,
                        const TextResult& result, const absl::Status& status) {
  const std::string number = cat(item.index);
  OrderedJson line = {{"id", "batch_req_" + number}, {"custom_id", item.id}};
  if (!status.ok()) {
    line["response"] = nullptr;
    line["error"] = {{"code", error_code(status)}, {"message", std::string(status.message())}};
    return dump(line);
  }
  const bool chat = item.kind == BatchItem::Kind::kOpenAiChat;
  OrderedJson choice = {{"index", 0}};
  if (chat) {
    choice["message"] = {{"role", "assistant"}, {"content", result.text}};
  } else {
    choice["text"] = result.text;
  }
  choice["logprobs"] = nullptr;
  choice["finish_reason"] = finish_reason(result);
  const std::size_t output_tokens = result.generation.tokens.size();
  line["response"] = {{"status_code", 200},
                      {"request_id", "req_" + number},
                      {"body",
                       {{"id", (chat ? "chatcmpl-" : "cmpl-") + number},
                        {"object", chat ? "chat.completion" : "text_completion"},
                        {"created", static_cast<std::int64_t>(std::time(nullptr))},
                        {"model", std::string(model)},
                        {"choices", OrderedJson::array({choice})},
                        {"usage",
                         {{"prompt_tokens", prompt_tokens},
                          {"completion_tokens", output_tokens},
                          {"total_tokens", prompt_tokens + output_tokens}}}}}};
  line["error"] = nullptr;
  return dump(line);
}

// The item that a result line belongs to; none when it is no line of ours, or another input's.
const BatchItem* item_of(const Json& line, const std::vector<BatchItem>& items) {
  const auto text = [&](const char* name) {
    const auto field = line.find(name);
    return field != line.end() && field->is_string() ? field->get<std::string>() : std::string();
  };
  constexpr std::string_view kOpenAiId = "batch_req_";
  std::uint64_t index = items.size();
  if (const std::string id = text("id"); line.contains("custom_id") && id.starts_with(kOpenAiId)) {
    const char* end = id.data() + id.size();
    if (std::from_chars(id.data() + kOpenAiId.size(), end, index).ptr != end) return nullptr;
  } else if (const auto field = line.find("index");
             field != line.end() && field->is_number_unsigned()) {
    index = field->get<std::uint64_t>();
  }
  if (index >= items.size()) return nullptr;
  const BatchItem& item = items[index];
  // As the line would be written now, without what the model made.
  const Json own = Json::parse(result_line(item, {}, 0, {}, absl::UnknownError("")));
  for (const char* name : {"id", "custom_id", "prompt"}) {
    if (line.contains(name) != own.contains(name)) return nullptr;
    if (own.contains(name) && line[name] != own[name]) return nullptr;
  }
  return &item;
}

// What is no text must not become prompts, thousands of them for an archive.
absl::Status check_text(std::string_view text, std::string_view name) {
  std::string repaired;
  for (std::size_t number = 1; !text.empty(); ++number) {
    const std::string_view line = text.substr(0, text.find('\n'));
    text.remove_prefix(std::min(line.size() + 1, text.size()));
    repaired.clear();
    tok::Utf8Repair repair;
    repair.push(line, repaired);
    repair.finish(repaired);
    const bool nul = line.find('\0') != line.npos;
    if (nul || repaired != line) {
      return absl::InvalidArgumentError(
          cat(name, " is not a text file: line ", number,
              nul ? " holds a NUL byte" : " is not valid UTF-8",
              "; give prompts as UTF-8 text (one a line) or JSON lines"));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<EarlierResults> read_results(std::string_view text,
                                            const std::vector<BatchItem>& items) {
  EarlierResults results{.finished = std::vector<bool>(items.size())};
  for (std::size_t number = 1; !text.empty(); ++number) {
    const std::size_t end = std::min(text.find('\n'), text.size());
    const bool whole = end < text.size();
    const Json line = Json::parse(text.substr(0, end), nullptr, /*allow_exceptions=*/false);
    const BatchItem* item = line.is_object() ? item_of(line, items) : nullptr;
    if (item == nullptr && !whole && line.is_discarded()) break;
    if (item == nullptr) {
      return absl::InvalidArgumentError(
          cat("line ", number, " is not the result of a prompt of this input"));
    }
    if (!results.finished[item->index]) ++results.n_finished;
    results.finished[item->index] = true;
    results.bytes += end + (whole ? 1 : 0);
    results.unended = !whole;
    text.remove_prefix(end + (whole ? 1 : 0));
  }
  return results;
}

std::vector<BatchItem> parse_batch(std::string_view text, std::string_view name) {
  std::vector<BatchItem> items;
  std::optional<bool> json_lines;
  if (name.ends_with(".jsonl")) json_lines = true;
  while (!text.empty()) {
    const std::size_t end = std::min(text.find('\n'), text.size());
    std::string_view line = text.substr(0, end);
    text.remove_prefix(std::min(end + 1, text.size()));
    if (line.ends_with('\r')) line.remove_suffix(1);
    if (line.find_first_not_of(" \t") == line.npos) continue;
    // A text file may well hold a prompt that starts with a brace, so the first line decides.
    if (!json_lines) {
      const Json first = Json::parse(line, nullptr, /*allow_exceptions=*/false);
      json_lines = first.is_object() && (first.contains("prompt") || first.contains("messages") ||
                                         first.contains("custom_id"));
    }
    BatchItem item;
    item.index = items.size();
    if (*json_lines) {
      item.status = read_json_item(line, item);
    } else {
      item.prompt = line;
    }
    items.push_back(std::move(item));
  }
  return items;
}

absl::StatusOr<std::vector<BatchItem>> read_batch(const std::string& file) {
  auto text = read_text_file(file == "-" ? "/dev/stdin" : file, kMaxInputBytes);
  if (!text.ok()) return text.status();
  if (absl::Status status = check_text(*text, file); !status.ok()) return status;
  std::vector<BatchItem> items = parse_batch(*text, file);
  if (items.empty()) return absl::InvalidArgumentError(cat(file, " holds no prompt"));
  return items;
}

std::string result_line(const BatchItem& item, std::string_view model, std::size_t prompt_tokens,
                        const TextResult& result, const absl::Status& status) {
  if (item.kind != BatchItem::Kind::kPlain) {
    return openai_line(item, model, prompt_tokens, result, status);
  }
  OrderedJson line = {{"index", item.index}};
  if (!item.id.empty()) line["id"] = item.id;
  if (item.messages.empty()) line["prompt"] = item.prompt;
  if (!status.ok()) {
    line["error"] = {{"code", error_code(status)}, {"message", std::string(status.message())}};
    return dump(line);
  }
  line["text"] = result.text;
  line["finish_reason"] = finish_reason(result);
  line["prompt_tokens"] = prompt_tokens;
  line["output_tokens"] = result.generation.tokens.size();
  line["ttft_ms"] = std::round(result.generation.ttft_ms * 1e3) / 1e3;
  line["e2el_ms"] = std::round(result.generation.e2el_ms * 1e3) / 1e3;
  return dump(line);
}

}  // namespace infemeral
