// The pre_tokenizer of tokenizer.json: cuts normalised text into the words that BPE works on.
#pragma once

#include <cstddef>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "engine/tokenizer_regex.h"

namespace infemeral::tok {

// A part of a text, and whether the pattern matched it.
struct TextRange {
  std::size_t begin;
  std::size_t end;
  bool match;
};

// Sequence of ByteLevel, Split, Digits and Metaspace. Immutable.
class PreTokenizer {
 public:
  // Reads the member "pre_tokenizer" (null: the text is one word). Throws LoadError.
  static PreTokenizer from_json(const nlohmann::json& document);

  // Buffers that a caller keeps between texts: one per thread.
  struct Scratch {
    MatchScratch regex;
    struct Level {
      std::vector<TextRange> ranges;
      std::string text;
    };
    std::vector<Level> levels;
  };

  // Calls `word` for every word of `text`, in order; none is empty. `text_start`: the text begins
  // where the user's input does (for Metaspace's prepend_scheme "first").
  absl::Status split(std::string_view text, bool text_start, Scratch& scratch,
                     absl::FunctionRef<absl::Status(std::string_view)> word) const;

 private:
  enum class Behavior { kRemoved, kIsolated, kMergedWithPrevious, kMergedWithNext, kContiguous };
  enum class Prepend { kAlways, kFirst, kNever };

  struct ByteLevelSplit {  // GPT-2's expression, and the space before the text
    bool add_prefix_space;
    std::vector<Regex> regex;  // one or none
  };
  struct ByteLevelMap {};  // each byte to its character; after all of the step's splits
  struct SplitRegex {
    Regex regex;
    Behavior behavior;
    bool invert;
  };
  struct SplitString {
    std::string pattern;
    Behavior behavior;
    bool invert;
  };
  struct Digits {
    bool individual;
  };
  struct Metaspace {
    std::string replacement;  // one character
    Prepend prepend;
    bool split;
  };
  using Step =
      std::variant<ByteLevelSplit, ByteLevelMap, SplitRegex, SplitString, Digits, Metaspace>;

  static Behavior behavior_from(std::string_view name, std::string_view where);
  static void apply_behavior(Behavior behavior, std::vector<TextRange>& ranges);

  // The words of one step: leaves the text that they are cut from in `text` (which may move to
  // level.text) and the ranges that remain in level.ranges.
  static absl::Status run(const ByteLevelSplit& step, bool text_start, MatchScratch& regex,
                          std::string_view& text, Scratch::Level& level);
  static absl::Status run(const ByteLevelMap& step, bool text_start, MatchScratch& regex,
                          std::string_view& text, Scratch::Level& level);
  static absl::Status run(const SplitRegex& step, bool text_start, MatchScratch& regex,
                          std::string_view& text, Scratch::Level& level);
  static absl::Status run(const SplitString& step, bool text_start, MatchScratch& regex,
                          std::string_view& text, Scratch::Level& level);
  static absl::Status run(const Digits& step, bool text_start, MatchScratch& regex,
                          std::string_view& text, Scratch::Level& level);
  static absl::Status run(const Metaspace& step, bool text_start, MatchScratch& regex,
                          std::string_view& text, Scratch::Level& level);
  absl::Status split_from(std::size_t step, std::string_view text, bool text_start,
                          Scratch& scratch,
                          absl::FunctionRef<absl::Status(std::string_view)> word) const;

  std::vector<Step> steps_;
};

// GPT-2's alphabet: the printable character that stands for a byte, and back (-1: for none).
char32_t byte_to_char(unsigned char byte);
int char_to_byte(char32_t c);

}  // namespace infemeral::tok
