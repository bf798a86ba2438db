#include "engine/tokenizer_normalizer.h"

#include <utf8proc.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "engine/tokenizer_json.h"
#include "engine/tokenizer_unicode.h"

namespace infemeral::tok {
namespace {

int combining_class(utf8proc_int32_t c) {
  return utf8proc_get_property(c)->combining_class;
}

// Normalises characters that neither compose with nor are reordered past what surrounds them.
// utf8proc's own driver orders marks by insertion, which is quadratic on a long run of them.
void normalize_block(std::string_view block, utf8proc_option_t options,
                     std::vector<utf8proc_int32_t>& buffer, std::string& out) {
  buffer.clear();
  int boundary_class = UTF8PROC_BOUNDCLASS_START;
  for (std::size_t pos = 0; pos < block.size();) {
    const auto c = static_cast<utf8proc_int32_t>(next_char(block, pos));
    utf8proc_int32_t parts[32];  // the longest decomposition, of U+FDFA, has 18
    const utf8proc_ssize_t n = utf8proc_decompose_char(c, parts, 32, options, &boundary_class);
    if (n > 0 && n <= 32) buffer.insert(buffer.end(), parts, parts + n);
  }
  for (auto it = buffer.begin(); it != buffer.end();) {
    if (combining_class(*it) == 0) {
      ++it;
      continue;
    }
    const auto end = std::find_if(it, buffer.end(), [](auto c) { return combining_class(c) == 0; });
    std::stable_sort(it, end,
                     [](auto a, auto b) { return combining_class(a) < combining_class(b); });
    it = end;
  }
  const utf8proc_ssize_t n = utf8proc_normalize_utf32(
      buffer.data(), static_cast<utf8proc_ssize_t>(buffer.size()), options);
  for (utf8proc_ssize_t i = 0; i < n; ++i) {
    append_utf8(out, static_cast<char32_t>(buffer[static_cast<std::size_t>(i)]));
  }
}

}  // namespace

Normalizer Normalizer::from_json(const nlohmann::json& document) {
  Normalizer normalizer;
  for (const Component& part : components(document, "normalizer", "normalizers")) {
    if (part.type == "NFC") {
      normalizer.steps_.emplace_back(UnicodeForm{.compose = true, .compatibility = false});
    } else if (part.type == "NFD") {
      normalizer.steps_.emplace_back(UnicodeForm{.compose = false, .compatibility = false});
    } else if (part.type == "NFKC") {
      normalizer.steps_.emplace_back(UnicodeForm{.compose = true, .compatibility = true});
    } else if (part.type == "NFKD") {
      normalizer.steps_.emplace_back(UnicodeForm{.compose = false, .compatibility = true});
    } else if (part.type == "Prepend") {
      normalizer.steps_.emplace_back(Prepend{string_member(*part.object, "prepend", part.where)});
    } else if (part.type == "Replace") {
      const nlohmann::json& pattern = member(*part.object, "pattern", part.where);
      if (is_null(pattern, "String")) unsupported(part.where, "a pattern other than String");
      Replace step{string_member(pattern, "String", part.where),
                   string_member(*part.object, "content", part.where)};
      if (step.pattern.empty()) invalid(part.where, "the pattern is empty");
      // Text may grow by the factor; a vocabulary that needs more than this is no vocabulary.
      if (step.content.size() > 64) unsupported(part.where, "a content longer than 64 bytes");
      normalizer.steps_.emplace_back(std::move(step));
    } else {
      unsupported(part.where, absl::StrCat("type ", shown(part.type)));
    }
  }
  if (normalizer.steps_.size() > 8) unsupported("normalizer", "more than 8 steps");
  return normalizer;
}

void Normalizer::apply(MarkedText& text) const {
  for (const auto& step : steps_) {
    std::visit([&](const auto& s) { run(s, text); }, step);
  }
}

// An ASCII character decomposes to itself, has combining class 0 and is never the second part of a
// composition, so the text can be cut before each; likewise around a character that Hugging Face's
// tables do not know. The blocks keep the marks: a block is trusted if all of it was.
void Normalizer::run(const UnicodeForm& step, MarkedText& text) {
  const auto is_ascii = [](char c) { return static_cast<unsigned char>(c) < 0x80; };
  if (std::all_of(text.bytes.begin(), text.bytes.end(), is_ascii)) return;
  const auto options = static_cast<utf8proc_option_t>(
      UTF8PROC_STABLE | (step.compose ? UTF8PROC_COMPOSE : UTF8PROC_DECOMPOSE) |
      (step.compatibility ? UTF8PROC_COMPAT : 0));
  MarkedText result;
  result.bytes.reserve(text.bytes.size());
  result.marks.reserve(text.bytes.size());
  std::vector<utf8proc_int32_t> buffer;
  const auto flush = [&](std::size_t begin, std::size_t end, bool as_it_is) {
    if (begin == end) return;
    const std::string_view block = std::string_view(text.bytes).substr(begin, end - begin);
    const std::string_view marks = std::string_view(text.marks).substr(begin, end - begin);
    if (as_it_is) {
      result.bytes += block;
      result.marks += marks;
      return;
    }
    const std::size_t start = result.bytes.size();
    normalize_block(block, options, buffer, result.bytes);
    // The ASCII character in front is still itself, unless a mark went into it.
    if (is_ascii(block[0]) && result.bytes[start] == block[0]) result.marks.push_back(marks[0]);
    const bool trusted = marks.find(MarkedText::kUntrusted) == std::string_view::npos;
    result.marks.resize(result.bytes.size(),
                        trusted ? MarkedText::kTrusted : MarkedText::kUntrusted);
  };
  std::size_t begin = 0;
  for (std::size_t pos = 0; pos < text.bytes.size();) {
    const std::size_t here = pos;
    const char32_t c = next_char(text.bytes, pos);
    if (c < 0x80) {
      // An ASCII character followed by another needs no normalising.
      flush(begin, here, here - begin == 1 && is_ascii(text.bytes[begin]));
      begin = here;
    } else if (is_unknown_to_normalizer(c)) {
      flush(begin, here, false);
      flush(here, pos, true);
      begin = pos;
    }
  }
  flush(begin, text.bytes.size(), false);
  text = std::move(result);
}

// What is put in front of the text belongs to its first character.
void Normalizer::run(const Prepend& step, MarkedText& text) {
  if (text.bytes.empty()) return;
  text.marks.insert(0, step.prefix.size(), text.marks.front());
  text.bytes.insert(0, step.prefix);
}

void Normalizer::run(const Replace& step, MarkedText& text) {
  std::size_t found = text.bytes.find(step.pattern);
  if (found == std::string::npos) return;
  MarkedText result;
  std::size_t begin = 0;
  for (; found != std::string::npos; found = text.bytes.find(step.pattern, begin)) {
    const std::size_t end = found + step.pattern.size();
    result.bytes.append(text.bytes, begin, found - begin).append(step.content);
    result.marks.append(text.marks, begin, found - begin);
    const auto marks = std::string_view(text.marks).substr(found, step.pattern.size());
    const bool trusted = marks.find(MarkedText::kUntrusted) == std::string_view::npos;
    result.marks.append(step.content.size(),
                        trusted ? MarkedText::kTrusted : MarkedText::kUntrusted);
    begin = end;
  }
  result.bytes.append(text.bytes, begin);
  result.marks.append(text.marks, begin);
  text = std::move(result);
}

}  // namespace infemeral::tok
