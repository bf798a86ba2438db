// The normalizer of tokenizer.json: what happens to the text between added tokens before it is
// split.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <variant>
#include <vector>

namespace infemeral::tok {

// Text with one mark per byte: may a special token be recognised here? See encode_segments.
struct MarkedText {
  std::string bytes;  // valid UTF-8
  std::string marks;  // as long as bytes; kTrusted or kUntrusted

  static constexpr char kTrusted = 1;
  static constexpr char kUntrusted = 0;
};

// Sequence of NFC, NFD, NFKC, NFKD, Prepend and Replace(String). Immutable.
class Normalizer {
 public:
  // Reads the member "normalizer" (null: nothing to do). Throws LoadError.
  static Normalizer from_json(const nlohmann::json& document);

  bool empty() const { return steps_.empty(); }
  void apply(MarkedText& text) const;

 private:
  struct UnicodeForm {
    bool compose;
    bool compatibility;
  };
  struct Prepend {
    std::string prefix;
  };
  struct Replace {
    std::string pattern;
    std::string content;
  };

  static void run(const UnicodeForm& step, MarkedText& text);
  static void run(const Prepend& step, MarkedText& text);
  static void run(const Replace& step, MarkedText& text);

  std::vector<std::variant<UnicodeForm, Prepend, Replace>> steps_;
};

}  // namespace infemeral::tok
