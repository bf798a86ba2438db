#include "engine/tokenizer_json.h"

#include <nlohmann/json.hpp>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "engine/json_file.h"

namespace infemeral::tok {
namespace {

constexpr std::size_t kMaxDocumentBytes = std::size_t{256} << 20;
constexpr std::size_t kMaxComponents = 64;

void flatten(const nlohmann::json& object, const char* list_key, const std::string& where,
             std::vector<Component>& out) {
  const std::string type = string_member(object, "type", where);
  if (type != "Sequence") {
    if (out.size() == kMaxComponents) unsupported(where, "more than 64 steps");
    out.push_back({&object, type, where});
    return;
  }
  const nlohmann::json& list = member(object, list_key, where);
  if (!list.is_array()) invalid(where, absl::StrCat(list_key, " is not a list"));
  for (std::size_t i = 0; i < list.size(); ++i) {
    flatten(list[i], list_key, absl::StrCat(where, ".", list_key, "[", i, "]"), out);
  }
}

}  // namespace

void invalid(std::string_view where, std::string_view what) {
  throw LoadError(absl::InvalidArgumentError(std::string(where) + ": " + std::string(what)));
}

void unsupported(std::string_view where, std::string_view what) {
  throw LoadError(absl::UnimplementedError(std::string(where) + ": " + std::string(what) +
                                           " is not supported by this tokenizer"));
}

std::string shown(std::string_view text) {
  constexpr std::size_t kLongest = 60;
  const bool cut = text.size() > kLongest;
  return absl::StrCat("\"", absl::CHexEscape(std::string(text.substr(0, kLongest))),
                      cut ? "..." : "", "\"");
}

nlohmann::json parse_document(std::string_view text) {
  if (text.size() > kMaxDocumentBytes) {
    throw LoadError(absl::ResourceExhaustedError("the JSON document is larger than 256 MiB"));
  }
  auto document = parse_json(text, "the JSON document");
  if (!document.ok()) throw LoadError(document.status());
  if (!document->is_object()) invalid("the JSON document", "not an object");
  return *std::move(document);
}

absl::StatusOr<std::string> read_document(const std::filesystem::path& path) {
  return read_text_file(path, kMaxDocumentBytes);
}

const nlohmann::json& member(const nlohmann::json& object, const char* key,
                             std::string_view where) {
  if (!object.is_object()) invalid(where, "not an object");
  const auto it = object.find(key);
  if (it == object.end()) invalid(where, absl::StrCat("has no \"", key, "\""));
  return *it;
}

bool is_null(const nlohmann::json& object, const char* key) {
  const auto it = object.find(key);
  return it == object.end() || it->is_null();
}

bool bool_member(const nlohmann::json& object, const char* key, bool fallback,
                 std::string_view where) {
  if (is_null(object, key)) return fallback;
  const nlohmann::json& value = *object.find(key);
  if (!value.is_boolean()) invalid(where, absl::StrCat(key, " is not true or false"));
  return value.get<bool>();
}

std::string string_member(const nlohmann::json& object, const char* key, std::string_view where) {
  const nlohmann::json& value = member(object, key, where);
  if (!value.is_string()) invalid(where, absl::StrCat(key, " is not a string"));
  return value.get<std::string>();
}

std::size_t count_member(const nlohmann::json& object, const char* key, std::string_view where) {
  const nlohmann::json& value = member(object, key, where);
  if (!value.is_number_unsigned()) invalid(where, absl::StrCat(key, " is not a count"));
  return value.get<std::size_t>();
}

std::vector<Component> components(const nlohmann::json& document, const char* key,
                                  const char* list_key) {
  std::vector<Component> out;
  if (!is_null(document, key)) flatten(*document.find(key), list_key, key, out);
  return out;
}

}  // namespace infemeral::tok
