// The decoder of tokenizer.json: from tokens back to text, token by token.
#pragma once

#include <cstddef>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "engine/tokenizer_unicode.h"

namespace infemeral::tok {

// Sequence of Replace(String), ByteFallback, Strip and Metaspace on each token, then ByteLevel or
// Fuse, then Strip on the whole text. Immutable.
class Decoder {
 public:
  // Reads the member "decoder" (null: the tokens with spaces between them). Throws LoadError.
  static Decoder from_json(const nlohmann::json& document);

 private:
  friend class DecoderState;
  struct Replace {
    std::string pattern;
    std::string content;
  };
  struct ByteFallback {};
  struct Strip {
    char32_t character;
    std::size_t start;
    std::size_t stop;
  };
  struct Metaspace {
    std::string replacement;
    bool drop_first;
  };
  enum class Join { kConcatenate, kSpaces, kByteLevel };

  std::vector<std::variant<Replace, ByteFallback, Strip, Metaspace>> token_steps_;
  Join join_ = Join::kConcatenate;
  std::vector<Strip> text_steps_;
};

// One text in the making. Everything that push and finish append, put together, is the text; every
// piece is whole UTF-8. A run of byte tokens is held back until it ends, since one bad byte
// replaces all of it.
class DecoderState {
 public:
  explicit DecoderState(const Decoder& decoder);  // kept by reference

  void push(std::string_view token, std::string& out);
  void finish(std::string& out);  // and start afresh

 private:
  struct StripState {
    bool at_start = true;
    std::size_t stripped = 0;
    std::size_t held = 0;  // characters to strip that are last so far
  };

  void run(std::size_t step, std::string token, std::string& out);
  void flush_bytes(std::size_t step, std::string& out);
  void join(std::string_view token, std::string& out);
  void strip_text(std::size_t step, std::string_view piece, std::string& out);

  const Decoder* decoder_;
  std::vector<std::string> pending_bytes_;  // by token step; of ByteFallback
  std::vector<bool> seen_token_;            // by token step; for Metaspace
  bool joined_any_ = false;
  Utf8Repair repair_;
  std::vector<StripState> strip_;  // by text step
};

}  // namespace infemeral::tok
