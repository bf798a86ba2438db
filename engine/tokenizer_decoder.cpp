#include "engine/tokenizer_decoder.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/tokenizer_json.h"
#include "engine/tokenizer_pretokenizer.h"

namespace infemeral::tok {
namespace {

constexpr std::string_view kReplacementChar = "\xEF\xBF\xBD";

char32_t one_char(const std::string& text, std::string_view where, std::string_view field) {
  std::size_t pos = 0;
  const char32_t c = text.empty() ? 0 : next_char(text, pos);
  if (text.empty() || pos != text.size()) {
    invalid(where, std::string(field) + " is not one character");
  }
  return c;
}

// "<0x0A>" is the byte 10. Returns -1 for anything else.
int byte_of_token(std::string_view token) {
  if (token.size() != 6 || !token.starts_with("<0x") || token[5] != '>') return -1;
  std::uint32_t byte = 0;
  // from_str_radix takes a sign, so <0x+A> is a byte too.
  const std::string_view digits = token.substr(token[3] == '+' ? 4 : 3, token[3] == '+' ? 1 : 2);
  for (char c : digits) {
    if (c >= '0' && c <= '9') {
      byte = byte * 16 + static_cast<std::uint32_t>(c - '0');
    } else if ((c | 0x20) >= 'a' && (c | 0x20) <= 'f') {
      byte = byte * 16 + static_cast<std::uint32_t>((c | 0x20) - 'a' + 10);
    } else {
      return -1;
    }
  }
  return static_cast<int>(byte);
}

bool is_valid_utf8(std::string_view bytes) {
  Utf8Repair repair;
  std::string repaired;
  repair.push(bytes, repaired);
  repair.finish(repaired);
  return repaired == bytes;
}

}  // namespace

Decoder Decoder::from_json(const nlohmann::json& document) {
  Decoder decoder;
  if (is_null(document, "decoder")) {
    decoder.join_ = Join::kSpaces;
    return decoder;
  }
  bool joined = false;
  for (const Component& part : components(document, "decoder", "decoders")) {
    const nlohmann::json& object = *part.object;
    if (joined && part.type != "Strip" && part.type != "Fuse") {
      unsupported(part.where, absl::StrCat("type ", shown(part.type), " after ByteLevel or Fuse"));
    }
    if (part.type == "ByteLevel") {
      decoder.join_ = Join::kByteLevel;
      joined = true;
    } else if (part.type == "Fuse") {
      joined = true;
    } else if (part.type == "Strip") {
      const Strip step{
          one_char(string_member(object, "content", part.where), part.where, "content"),
          count_member(object, "start", part.where), count_member(object, "stop", part.where)};
      if (joined) {
        decoder.text_steps_.push_back(step);
      } else {
        decoder.token_steps_.emplace_back(step);
      }
    } else if (part.type == "Replace") {
      const nlohmann::json& pattern = member(object, "pattern", part.where);
      if (is_null(pattern, "String")) unsupported(part.where, "a pattern other than String");
      Replace step{string_member(pattern, "String", part.where),
                   string_member(object, "content", part.where)};
      if (step.pattern.empty()) invalid(part.where, "the pattern is empty");
      if (step.content.size() > 64) unsupported(part.where, "a content longer than 64 bytes");
      decoder.token_steps_.emplace_back(std::move(step));
    } else if (part.type == "ByteFallback") {
      decoder.token_steps_.emplace_back(ByteFallback{});
    } else if (part.type == "Metaspace") {
      Metaspace step{string_member(object, "replacement", part.where),
                     bool_member(object, "add_prefix_space", true, part.where)};
      one_char(step.replacement, part.where, "replacement");
      if (!is_null(object, "prepend_scheme")) {
        step.drop_first = string_member(object, "prepend_scheme", part.where) != "never";
      }
      decoder.token_steps_.emplace_back(std::move(step));
    } else {
      unsupported(part.where, absl::StrCat("type ", shown(part.type)));
    }
  }
  if (decoder.token_steps_.size() > 8) unsupported("decoder", "more than 8 steps");
  return decoder;
}

DecoderState::DecoderState(const Decoder& decoder)
    : decoder_(&decoder),
      pending_bytes_(decoder.token_steps_.size()),
      seen_token_(decoder.token_steps_.size()),
      strip_(decoder.text_steps_.size()) {}

void DecoderState::push(std::string_view token, std::string& out) {
  run(0, std::string(token), out);
}

void DecoderState::finish(std::string& out) {
  for (std::size_t step = 0; step < pending_bytes_.size(); ++step) flush_bytes(step, out);
  if (decoder_->join_ == Decoder::Join::kByteLevel) {
    std::string rest;
    repair_.finish(rest);
    strip_text(0, rest, out);
  }
  // What the steps hold back at the end is what they strip.
  *this = DecoderState(*decoder_);
}

void DecoderState::flush_bytes(std::size_t step, std::string& out) {
  if (pending_bytes_[step].empty()) return;
  const std::string bytes = std::exchange(pending_bytes_[step], {});
  if (is_valid_utf8(bytes)) {
    run(step + 1, bytes, out);
  } else {
    for (std::size_t i = 0; i < bytes.size(); ++i)
      run(step + 1, std::string(kReplacementChar), out);
  }
}

void DecoderState::run(std::size_t step, std::string token, std::string& out) {
  if (step == decoder_->token_steps_.size()) return join(token, out);
  const auto& rule = decoder_->token_steps_[step];
  if (const auto* replace = std::get_if<Decoder::Replace>(&rule)) {
    std::string result;
    std::size_t begin = 0;
    for (std::size_t found; (found = token.find(replace->pattern, begin)) != std::string::npos;
         begin = found + replace->pattern.size()) {
      result.append(token, begin, found - begin).append(replace->content);
    }
    run(step + 1, result.append(token, begin), out);
  } else if (std::holds_alternative<Decoder::ByteFallback>(rule)) {
    if (const int byte = byte_of_token(token); byte >= 0) {
      pending_bytes_[step].push_back(static_cast<char>(byte));
    } else {
      flush_bytes(step, out);
      run(step + 1, std::move(token), out);
    }
  } else if (const auto* strip = std::get_if<Decoder::Strip>(&rule)) {
    std::size_t begin = 0;
    for (std::size_t i = 0; i < strip->start && begin < token.size(); ++i) {
      std::size_t after = begin;
      if (next_char(token, after) != strip->character) break;
      begin = after;
    }
    std::string content;
    append_utf8(content, strip->character);
    std::string_view rest = std::string_view(token).substr(begin);
    for (std::size_t i = 0; i < strip->stop && rest.ends_with(content); ++i) {
      rest.remove_suffix(content.size());
    }
    run(step + 1, std::string(rest), out);
  } else if (const auto* metaspace = std::get_if<Decoder::Metaspace>(&rule)) {
    const bool drop = metaspace->drop_first && !seen_token_[step];
    seen_token_[step] = true;
    std::string result;
    std::size_t begin = 0;
    for (std::size_t found;
         (found = token.find(metaspace->replacement, begin)) != std::string::npos;
         begin = found + metaspace->replacement.size()) {
      result.append(token, begin, found - begin).append(drop ? "" : " ");
    }
    run(step + 1, result.append(token, begin), out);
  }
}

void DecoderState::join(std::string_view token, std::string& out) {
  switch (decoder_->join_) {
    case Decoder::Join::kConcatenate:
      return strip_text(0, token, out);
    case Decoder::Join::kSpaces:
      if (joined_any_) strip_text(0, " ", out);
      joined_any_ = true;
      return strip_text(0, token, out);
    case Decoder::Join::kByteLevel:
      break;
  }
  // A token with a character outside the byte alphabet (an added one) stands for its own bytes.
  std::string bytes;
  for (std::size_t pos = 0; pos < token.size();) {
    const int byte = char_to_byte(next_char(token, pos));
    if (byte < 0) {
      bytes.assign(token);
      break;
    }
    bytes.push_back(static_cast<char>(byte));
  }
  std::string text;
  repair_.push(bytes, text);
  strip_text(0, text, out);
}

void DecoderState::strip_text(std::size_t step, std::string_view piece, std::string& out) {
  if (step == strip_.size()) {
    out += piece;
    return;
  }
  const Decoder::Strip& rule = decoder_->text_steps_[step];
  StripState& state = strip_[step];
  std::string result;
  for (std::size_t pos = 0; pos < piece.size();) {
    const char32_t c = next_char(piece, pos);
    if (state.at_start && state.stripped < rule.start && c == rule.character) {
      ++state.stripped;
      continue;
    }
    state.at_start = false;
    if (c == rule.character && rule.stop > 0) {
      // The last `stop` of a trailing run go; one more than that shows that the first stays.
      if (state.held == rule.stop) {
        append_utf8(result, c);
      } else {
        ++state.held;
      }
      continue;
    }
    for (; state.held > 0; --state.held) append_utf8(result, rule.character);
    append_utf8(result, c);
  }
  strip_text(step + 1, result, out);
}

}  // namespace infemeral::tok
