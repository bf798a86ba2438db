// Reading the tokenizer's JSON files. What is wrong in a file leaves the reading functions as a
// LoadError, which Tokenizer::parse and ChatTemplate::parse turn into their status.
#pragma once

#include <exception>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace infemeral::tok {

class LoadError : public std::exception {
 public:
  explicit LoadError(absl::Status status) : status_(std::move(status)) {}
  const absl::Status& status() const { return status_; }
  const char* what() const noexcept override { return "tokenizer file refused"; }

 private:
  absl::Status status_;
};

[[noreturn]] void invalid(std::string_view where, std::string_view what);
[[noreturn]] void unsupported(std::string_view where, std::string_view what);

// Text from the file as an error message can show it: escaped, cut, in quotation marks.
std::string shown(std::string_view text);

// Parses a document of bounded size and nesting. Throws LoadError.
nlohmann::json parse_document(std::string_view text);

// The whole file, as read_text_file(); ResourceExhausted over 256 MiB.
absl::StatusOr<std::string> read_document(const std::filesystem::path& path);

// A member of an object; `where` names the object in messages. A missing or null member takes the
// fallback where there is one.
const nlohmann::json& member(const nlohmann::json& object, const char* key, std::string_view where);
bool is_null(const nlohmann::json& object, const char* key);
bool bool_member(const nlohmann::json& object, const char* key, bool fallback,
                 std::string_view where);
std::string string_member(const nlohmann::json& object, const char* key, std::string_view where);
std::size_t count_member(const nlohmann::json& object, const char* key, std::string_view where);

// A component that is either one object with a "type" or a Sequence of them under `list_key`: the
// flat list, in order, empty for null.
struct Component {
  const nlohmann::json* object;
  std::string type;
  std::string where;
};
std::vector<Component> components(const nlohmann::json& document, const char* key,
                                  const char* list_key);

}  // namespace infemeral::tok
