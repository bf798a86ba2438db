// Any text through two small tokenizers: one of bytes, where decoding gives the text back, and one
// in the manner of Llama 2, which knows a few characters and bytes for the rest.
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "engine/tokenizer.h"

namespace {

using infemeral::StreamDecoder;
using infemeral::Tokenizer;

void check(bool holds) {
  if (!holds) std::abort();
}

void append_utf8(unsigned code, std::string& out) {
  if (code < 0x80) {
    out += static_cast<char>(code);
  } else {
    out += static_cast<char>(0xc0 | code >> 6);
    out += static_cast<char>(0x80 | (code & 0x3f));
  }
}

// GPT-2's characters for the bytes: the printable ones of Latin-1 as they are, the others from 256.
std::string byte_level_json() {
  std::string vocab, special;
  unsigned next = 256;
  for (unsigned byte = 0; byte < 256; ++byte) {
    const bool shown = (byte >= '!' && byte <= '~') || (byte >= 0xa1 && byte != 0xad);
    std::string character;
    if (byte == '"' || byte == '\\') character = "\\";
    append_utf8(shown ? byte : next++, character);
    vocab += "\"" + character + "\":" + std::to_string(byte) + ",";
  }
  return R"({"added_tokens":[{"id":260,"content":"<s>","special":true,"single_word":false,)"
         R"("lstrip":false,"rstrip":false,"normalized":false}],)"
         R"("pre_tokenizer":{"type":"ByteLevel","add_prefix_space":false,"use_regex":true},)"
         R"("decoder":{"type":"ByteLevel"},"model":{"type":"BPE","vocab":{)" +
         vocab + R"("he":256,"ll":257,"hell":258,"Ġt":259},)" +
         R"("merges":["h e","l l","he ll","Ġ t"]}})";
}

std::string byte_fallback_json() {
  std::string vocab;
  for (unsigned byte = 0; byte < 256; ++byte) {
    char name[8];
    std::snprintf(name, sizeof name, "<0x%02X>", byte);
    vocab += ",\"" + std::string(name) + "\":" + std::to_string(3 + byte);
  }
  return R"({"added_tokens":[{"id":1,"content":"<s>","special":true,"single_word":false,)"
         R"("lstrip":false,"rstrip":false,"normalized":false}],)"
         R"("normalizer":{"type":"Sequence","normalizers":[{"type":"Prepend","prepend":"▁"},)"
         R"({"type":"Replace","pattern":{"String":" "},"content":"▁"}]},)"
         R"("decoder":{"type":"Sequence","decoders":[{"type":"Replace","pattern":{"String":"▁"},)"
         R"("content":" "},{"type":"ByteFallback"},{"type":"Fuse"},{"type":"Strip","content":" ",)"
         R"("start":1,"stop":0}]},"model":{"type":"BPE","vocab":{"<unk>":0,"<s>":1,"▁":2)" +
         vocab + R"(,"a":259,"▁a":260,"é":261,"aé":262},"merges":["▁ a","a é"],)" +
         R"("byte_fallback":true,"fuse_unk":true,"unk_token":"<unk>"}})";
}

std::unique_ptr<const Tokenizer> parse(const std::string& json) {
  auto tokenizer = Tokenizer::parse(json);
  check(tokenizer.ok());
  return *std::move(tokenizer);
}

// Bytes of the character at `at`, 0 when it is none (RFC 3629).
std::size_t character_size(std::string_view text, std::size_t at) {
  const auto byte = [&](std::size_t i) -> unsigned {
    return at + i < text.size() ? static_cast<std::uint8_t>(text[at + i]) : 0;
  };
  const auto follows = [&](std::size_t i) { return (byte(i) & 0xc0) == 0x80; };
  const unsigned first = byte(0);
  if (first < 0x80) return 1;
  if (first >= 0xc2 && first < 0xe0) return follows(1) ? 2 : 0;
  if (first >= 0xe0 && first < 0xf0) {
    if (first == 0xe0 && byte(1) < 0xa0) return 0;
    if (first == 0xed && byte(1) >= 0xa0) return 0;
    return follows(1) && follows(2) ? 3 : 0;
  }
  if (first >= 0xf0 && first < 0xf5) {
    if (first == 0xf0 && byte(1) < 0x90) return 0;
    if (first == 0xf4 && byte(1) >= 0x90) return 0;
    return follows(1) && follows(2) && follows(3) ? 4 : 0;
  }
  return 0;
}

bool is_utf8(std::string_view text) {
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t size = character_size(text, at);
    if (size == 0) return false;
    at += size;
  }
  return true;
}

std::string streamed(const Tokenizer& tokenizer, const std::vector<std::int32_t>& ids) {
  StreamDecoder decoder(tokenizer, false);
  std::string text;
  for (const std::int32_t id : ids) {
    const std::string part = decoder.push(id);
    check(is_utf8(part));
    text += part;
  }
  return text + decoder.finish();
}

// Ids of plain text; every byte of it makes at most three (one that is no UTF-8 becomes U+FFFD).
std::vector<std::int32_t> encode(const Tokenizer& tokenizer, std::string_view text) {
  const auto ids = tokenizer.encode(text, {.add_special_tokens = false, .parse_special = false});
  check(ids.ok());
  check(ids->size() <= 3 * text.size() + 3);  // Prepend adds a character
  for (const std::int32_t id : *ids) {
    check(id >= 0 && static_cast<std::size_t>(id) < tokenizer.vocab_size());
    check(!tokenizer.is_special(id));
  }
  return *ids;
}

void cut(const Tokenizer& tokenizer, std::string_view text, std::size_t at,
         const std::vector<std::int32_t>& whole) {
  while (at < text.size() && (static_cast<std::uint8_t>(text[at]) & 0xc0) == 0x80) ++at;
  const std::vector<Tokenizer::Segment> parts = {{text.substr(0, at), false},
                                                 {text.substr(at), false}};
  const auto ids = tokenizer.encode_segments(parts, false);
  check(ids.ok() && *ids == whole);
}

}  // namespace

// The first byte says where the text is cut in two.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size == 0) return 0;
  static const auto bytes = parse(byte_level_json());
  static const auto fallback = parse(byte_fallback_json());
  const std::string_view text(reinterpret_cast<const char*>(data + 1), size - 1);
  const std::size_t at = data[0] % size;
  const bool valid = is_utf8(text);

  const auto ids = encode(*bytes, text);
  const std::string back = bytes->decode(ids, false);
  check(is_utf8(back) && streamed(*bytes, ids) == back);
  if (valid) {
    check(back == text);
    cut(*bytes, text, at, ids);
  } else {
    check(bytes->decode(encode(*bytes, back), false) == back);
  }
  check(bytes->encode(text, {.add_special_tokens = true, .parse_special = true}).ok());

  const auto pieces = encode(*fallback, text);
  const std::string again = fallback->decode(pieces, false);
  check(is_utf8(again) && streamed(*fallback, pieces) == again);
  // "▁" itself comes back as a space.
  if (valid && text.find("\xe2\x96\x81") == std::string_view::npos) {
    check(again == text);
    cut(*fallback, text, at, pieces);
  }
  return 0;
}
