#include "engine/tokenizer_pretokenizer.h"

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "engine/tokenizer_json.h"
#include "engine/tokenizer_unicode.h"

namespace infemeral::tok {
namespace {

// GPT-2's pre-tokenisation, which ByteLevel with use_regex implies.
constexpr std::string_view kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

constexpr bool stands_for_itself(int byte) {
  return (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
}

struct ByteAlphabet {
  std::array<char16_t, 256> to_char{};
  std::array<std::int16_t, 0x144> to_byte{};
  constexpr ByteAlphabet() {
    to_byte.fill(-1);
    char16_t next = 0x100;
    for (int byte = 0; byte < 256; ++byte) {
      const char16_t c = stands_for_itself(byte) ? static_cast<char16_t>(byte) : next++;
      to_char[static_cast<std::size_t>(byte)] = c;
      to_byte[c] = static_cast<std::int16_t>(byte);
    }
  }
};
constexpr ByteAlphabet kAlphabet;

// Every match of the pattern and what lies between: the ranges cover the text. Empty matches cut
// it, except directly behind the match before.
absl::Status all_matches(const Regex& regex, std::string_view text, MatchScratch& scratch,
                         std::vector<TextRange>& ranges) {
  std::size_t done = 0, from = 0;
  bool matched_before = false;
  while (from <= text.size()) {
    Regex::Match match;
    const absl::StatusOr<bool> found = regex.find(text, from, scratch, match);
    if (!found.ok()) return found.status();
    if (!*found) break;
    // Ours never moves backwards; a lookbehind with \K could, and has no translation.
    if (match.begin == match.end && matched_before && match.end == done) {
      if (from >= text.size()) break;
      next_char(text, from);
      continue;
    }
    if (done < match.begin) ranges.push_back({done, match.begin, false});
    ranges.push_back({match.begin, match.end, true});
    done = from = match.end;
    matched_before = true;
  }
  if (done < text.size()) ranges.push_back({done, text.size(), false});
  return absl::OkStatus();
}

void all_matches(std::string_view pattern, std::string_view text, std::vector<TextRange>& ranges) {
  std::size_t done = 0;
  for (std::size_t found = text.find(pattern); found != std::string_view::npos;
       found = text.find(pattern, done)) {
    if (done < found) ranges.push_back({done, found, false});
    done = found + pattern.size();
    ranges.push_back({found, done, true});
  }
  if (done < text.size()) ranges.push_back({done, text.size(), false});
}

void invert(std::vector<TextRange>& ranges) {
  for (TextRange& range : ranges) range.match = !range.match;
}

}  // namespace

char32_t byte_to_char(unsigned char byte) {
  return kAlphabet.to_char[byte];
}
int char_to_byte(char32_t c) {
  return c < kAlphabet.to_byte.size() ? kAlphabet.to_byte[c] : -1;
}

PreTokenizer::Behavior PreTokenizer::behavior_from(std::string_view name, std::string_view where) {
  if (name == "Removed") return Behavior::kRemoved;
  if (name == "Isolated") return Behavior::kIsolated;
  if (name == "MergedWithPrevious") return Behavior::kMergedWithPrevious;
  if (name == "MergedWithNext") return Behavior::kMergedWithNext;
  if (name == "Contiguous") return Behavior::kContiguous;
  invalid(where, absl::StrCat("behavior ", shown(name), " is unknown"));
}

PreTokenizer PreTokenizer::from_json(const nlohmann::json& document) {
  PreTokenizer result;
  const auto compile = [](std::string_view pattern, const std::string& where) {
    absl::StatusOr<Regex> regex = Regex::compile(pattern);
    if (!regex.ok()) {
      throw LoadError(
          absl::Status(regex.status().code(), absl::StrCat(where, ": ", regex.status().message())));
    }
    return *std::move(regex);
  };
  for (const Component& part : components(document, "pre_tokenizer", "pretokenizers")) {
    const nlohmann::json& object = *part.object;
    if (part.type == "ByteLevel") {
      ByteLevelSplit step{bool_member(object, "add_prefix_space", true, part.where), {}};
      if (bool_member(object, "use_regex", true, part.where)) {
        step.regex.push_back(compile(kGpt2Pattern, part.where));
      }
      result.steps_.emplace_back(std::move(step));
      result.steps_.emplace_back(ByteLevelMap{});
    } else if (part.type == "Split") {
      const nlohmann::json& pattern = member(object, "pattern", part.where);
      const Behavior behavior =
          behavior_from(string_member(object, "behavior", part.where), part.where);
      const bool inverted = bool_member(object, "invert", false, part.where);
      if (!is_null(pattern, "String")) {
        std::string text = string_member(pattern, "String", part.where);
        if (text.empty()) invalid(part.where, "the pattern is empty");
        result.steps_.emplace_back(SplitString{std::move(text), behavior, inverted});
      } else {
        Regex regex = compile(string_member(pattern, "Regex", part.where), part.where);
        result.steps_.emplace_back(SplitRegex{std::move(regex), behavior, inverted});
      }
    } else if (part.type == "Digits") {
      result.steps_.emplace_back(
          Digits{bool_member(object, "individual_digits", false, part.where)});
    } else if (part.type == "Metaspace") {
      Metaspace step{string_member(object, "replacement", part.where), Prepend::kAlways,
                     bool_member(object, "split", true, part.where)};
      std::size_t pos = 0;
      if (step.replacement.empty() ||
          (next_char(step.replacement, pos), pos != step.replacement.size())) {
        invalid(part.where, "replacement is not one character");
      }
      // Before prepend_scheme there was add_prefix_space.
      std::string scheme =
          bool_member(object, "add_prefix_space", true, part.where) ? "always" : "never";
      if (!is_null(object, "prepend_scheme")) {
        scheme = string_member(object, "prepend_scheme", part.where);
      }
      if (scheme == "first") {
        step.prepend = Prepend::kFirst;
      } else if (scheme == "never") {
        step.prepend = Prepend::kNever;
      } else if (scheme != "always") {
        invalid(part.where, absl::StrCat("prepend_scheme ", shown(scheme), " is unknown"));
      }
      result.steps_.emplace_back(std::move(step));
    } else {
      unsupported(part.where, absl::StrCat("type ", shown(part.type)));
    }
  }
  return result;
}

// In the terms of Hugging Face's NormalizedString::split: what is left has no empty range and no
// range that is removed.
void PreTokenizer::apply_behavior(Behavior behavior, std::vector<TextRange>& ranges) {
  std::size_t kept = 0;
  switch (behavior) {
    case Behavior::kRemoved:
      std::erase_if(ranges, [](const TextRange& r) { return r.match; });
      break;
    case Behavior::kIsolated:
      break;
    case Behavior::kContiguous:
      for (const TextRange range : ranges) {
        if (kept > 0 && range.match == ranges[kept - 1].match) {
          ranges[kept - 1].end = range.end;
        } else {
          ranges[kept++] = range;
        }
      }
      ranges.resize(kept);
      break;
    case Behavior::kMergedWithPrevious: {
      bool previous_match = false;
      for (const TextRange range : ranges) {
        if (range.match && !previous_match && kept > 0) {
          ranges[kept - 1].end = range.end;
        } else {
          ranges[kept++] = range;
        }
        previous_match = range.match;
      }
      ranges.resize(kept);
      break;
    }
    case Behavior::kMergedWithNext: {
      bool next_match = false;
      for (std::size_t i = ranges.size(); i-- > 0;) {
        const TextRange range = ranges[i];
        if (range.match && !next_match && kept > 0) {
          ranges[ranges.size() - kept].begin = range.begin;
        } else {
          ranges[ranges.size() - ++kept] = range;
        }
        next_match = range.match;
      }
      ranges.erase(ranges.begin(), ranges.end() - static_cast<std::ptrdiff_t>(kept));
      break;
    }
  }
  std::erase_if(ranges, [](const TextRange& r) { return r.begin == r.end; });
}

absl::Status PreTokenizer::run(const ByteLevelSplit& step, bool, MatchScratch& regex,
                               std::string_view& text, Scratch::Level& level) {
  if (step.add_prefix_space && text.front() != ' ') {
    level.text.assign(1, ' ').append(text);
    text = level.text;
  }
  if (step.regex.empty()) {
    level.ranges.push_back({0, text.size(), false});
    return absl::OkStatus();
  }
  return all_matches(step.regex[0], text, regex, level.ranges);
}

absl::Status PreTokenizer::run(const ByteLevelMap&, bool, MatchScratch&, std::string_view& text,
                               Scratch::Level& level) {
  level.text.clear();
  for (char byte : text) append_utf8(level.text, byte_to_char(static_cast<unsigned char>(byte)));
  text = level.text;
  level.ranges.push_back({0, text.size(), false});
  return absl::OkStatus();
}

absl::Status PreTokenizer::run(const SplitRegex& step, bool, MatchScratch& regex,
                               std::string_view& text, Scratch::Level& level) {
  absl::Status status = all_matches(step.regex, text, regex, level.ranges);
  if (!status.ok()) return status;
  if (step.invert) invert(level.ranges);
  apply_behavior(step.behavior, level.ranges);
  return absl::OkStatus();
}

absl::Status PreTokenizer::run(const SplitString& step, bool, MatchScratch&, std::string_view& text,
                               Scratch::Level& level) {
  all_matches(step.pattern, text, level.ranges);
  if (step.invert) invert(level.ranges);
  apply_behavior(step.behavior, level.ranges);
  return absl::OkStatus();
}

absl::Status PreTokenizer::run(const Digits& step, bool, MatchScratch&, std::string_view& text,
                               Scratch::Level& level) {
  for (std::size_t pos = 0; pos < text.size();) {
    const std::size_t begin = pos;
    const bool digit = is_numeric(next_char(text, pos));
    const bool starts =
        level.ranges.empty() || digit != level.ranges.back().match || (digit && step.individual);
    if (starts) {
      level.ranges.push_back({begin, pos, digit});
    } else {
      level.ranges.back().end = pos;
    }
  }
  return absl::OkStatus();
}

absl::Status PreTokenizer::run(const Metaspace& step, bool text_start, MatchScratch&,
                               std::string_view& text, Scratch::Level& level) {
  level.text.clear();
  const bool has_mark = text.front() == ' ' || text.starts_with(step.replacement);
  if (!has_mark &&
      (step.prepend == Prepend::kAlways || (step.prepend == Prepend::kFirst && text_start))) {
    level.text = step.replacement;
  }
  for (char byte : text) {
    if (byte == ' ') {
      level.text += step.replacement;
    } else {
      level.text.push_back(byte);
    }
  }
  text = level.text;
  if (!step.split) {
    level.ranges.push_back({0, text.size(), false});
    return absl::OkStatus();
  }
  all_matches(step.replacement, text, level.ranges);
  apply_behavior(Behavior::kMergedWithNext, level.ranges);
  return absl::OkStatus();
}

absl::Status PreTokenizer::split(std::string_view text, bool text_start, Scratch& scratch,
                                 absl::FunctionRef<absl::Status(std::string_view)> word) const {
  scratch.levels.resize(steps_.size());
  if (text.empty()) return absl::OkStatus();
  return split_from(0, text, text_start, scratch, word);
}

absl::Status PreTokenizer::split_from(
    std::size_t step, std::string_view text, bool text_start, Scratch& scratch,
    absl::FunctionRef<absl::Status(std::string_view)> word) const {
  if (step == steps_.size()) return word(text);
  Scratch::Level& level = scratch.levels[step];
  level.ranges.clear();
  absl::Status status = std::visit(
      [&](const auto& s) { return run(s, text_start, scratch.regex, text, level); }, steps_[step]);
  for (std::size_t i = 0; status.ok() && i < level.ranges.size(); ++i) {
    const TextRange range = level.ranges[i];
    if (range.begin == range.end) continue;
    status = split_from(step + 1, text.substr(range.begin, range.end - range.begin),
                        text_start && range.begin == 0, scratch, word);
  }
  return status;
}

}  // namespace infemeral::tok
