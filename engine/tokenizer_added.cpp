#include "engine/tokenizer_added.h"

#include "engine/tokenizer_normalizer.h"
#include "engine/tokenizer_unicode.h"

namespace infemeral::tok {
namespace {

std::uint64_t edge(std::int32_t node, char byte) {
  return static_cast<std::uint64_t>(node) << 8 | static_cast<unsigned char>(byte);
}

// Where the character before `end` starts.
std::size_t previous_char(std::string_view text, std::size_t end) {
  std::size_t pos = end - 1;
  while ((static_cast<unsigned char>(text[pos]) & 0xC0) == 0x80) --pos;
  return pos;
}

bool word_before(std::string_view text, std::size_t pos) {
  if (pos == 0) return false;
  std::size_t begin = previous_char(text, pos);
  return is_word(next_char(text, begin));
}

bool word_after(std::string_view text, std::size_t pos) {
  return pos < text.size() && is_word(next_char(text, pos));
}

std::size_t skip_space_left(std::string_view text, std::size_t pos, std::size_t floor) {
  while (pos > floor) {
    const std::size_t begin = previous_char(text, pos);
    std::size_t after = begin;
    if (!is_white_space(next_char(text, after))) break;
    pos = begin;
  }
  return pos;
}

std::size_t skip_space_right(std::string_view text, std::size_t pos) {
  while (pos < text.size()) {
    std::size_t after = pos;
    if (!is_white_space(next_char(text, after))) break;
    pos = after;
  }
  return pos;
}

}  // namespace

void AddedTokenMatcher::add(const AddedToken& token, std::string_view pattern) {
  first_byte_[static_cast<unsigned char>(pattern[0])] = true;
  std::int32_t node = 0;
  for (char byte : pattern) {
    const auto [it, inserted] =
        edges_.try_emplace(edge(node, byte), static_cast<std::int32_t>(rule_at_.size()));
    if (inserted) rule_at_.push_back(-1);
    node = it->second;
  }
  std::int32_t& rule = rule_at_[static_cast<std::size_t>(node)];
  if (rule >= 0) return;
  rule = static_cast<std::int32_t>(rules_.size());
  rules_.push_back({token.id, token.special, token.single_word, token.lstrip, token.rstrip,
                    pattern.ends_with(token.content) ? pattern.size() - token.content.size() : 0});
}

AddedTokenMatcher::Match AddedTokenMatcher::longest_at(std::string_view text,
                                                       std::string_view marks,
                                                       std::size_t begin) const {
  Match best;
  std::int32_t node = 0;
  for (std::size_t pos = begin; pos < text.size();) {
    const auto it = edges_.find(edge(node, text[pos]));
    if (it == edges_.end()) break;
    node = it->second;
    ++pos;
    const std::int32_t index = rule_at_[static_cast<std::size_t>(node)];
    if (index < 0) continue;
    const Rule& rule = rules_[static_cast<std::size_t>(index)];
    bool as_text = false;
    if (rule.special) {
      const std::string_view content_marks =
          marks.substr(begin + rule.prefix, pos - begin - rule.prefix);
      as_text = content_marks.find(MarkedText::kTrusted) == std::string_view::npos;
      // Half in untrusted text it is no token, and what follows may be one.
      if (!as_text && content_marks.find(MarkedText::kUntrusted) != std::string_view::npos)
        continue;
    }
    best = {pos, &rule, as_text};
  }
  return best;
}

void AddedTokenMatcher::split(std::string_view text, std::string_view marks,
                              std::vector<AddedPiece>& pieces) const {
  std::size_t done = 0;
  if (!rules_.empty()) {
    for (std::size_t pos = 0; pos < text.size();) {
      if (!first_byte_[static_cast<unsigned char>(text[pos])]) {
        ++pos;
        continue;
      }
      const Match match = longest_at(text, marks, pos);
      if (match.rule == nullptr) {
        ++pos;
        continue;
      }
      std::size_t begin = pos, end = match.end;
      pos = match.end;
      if (match.as_text) continue;
      if (match.rule->single_word && (word_before(text, begin) || word_after(text, end))) continue;
      if (match.rule->lstrip) begin = skip_space_left(text, begin, done);
      if (match.rule->rstrip) end = skip_space_right(text, end);
      if (done < begin) pieces.push_back({done, begin, -1});
      pieces.push_back({begin, end, match.rule->id});
      done = end;
    }
  }
  if (done < text.size()) pieces.push_back({done, text.size(), -1});
}

}  // namespace infemeral::tok
