// What the tokenizer needs to know about characters and UTF-8.
//
// Hugging Face's `tokenizers` (0.23) mixes three Unicode versions: Oniguruma's 16 for regular
// expressions, Rust's 17 for digits, and about 9 for normalisation. Token ids follow from these, so
// the differences to the versions of PCRE2 and utf8proc here are written down as tables.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace infemeral::tok {

// The property White_Space: what \s means to Oniguruma and to Rust.
struct CodePointRange {
  char32_t first;
  char32_t last;
};
std::span<const CodePointRange> white_space_ranges();
bool is_white_space(char32_t c);

// General category N, Unicode 17 (Rust's char::is_numeric).
bool is_numeric(char32_t c);

// \w of Rust's regex crate: Alphabetic, M, Nd, Pc, Join_Control.
bool is_word(char32_t c);

// Code points that Unicode 15 and 16 assigned, with their general category ("Lu", "So", ...). The
// PCRE2 of Debian 12 knows Unicode 14.
struct CategoryRange {
  char32_t first;
  char32_t last;
  std::array<char, 2> category;
};
std::span<const CategoryRange> categories_since_unicode_14();

// True for the characters that Hugging Face's older normalisation tables do not know: it neither
// decomposes, reorders nor composes them.
bool is_unknown_to_normalizer(char32_t c);

// The character that starts at s[pos], and pos moved behind it. `s` must be valid UTF-8 and pos a
// character's first byte.
char32_t next_char(std::string_view s, std::size_t& pos);
void append_utf8(std::string& out, char32_t c);

// Valid UTF-8 out of any bytes, in pieces: each maximal invalid subpart becomes U+FFFD, as with
// Python's errors="replace" and Rust's from_utf8_lossy. A character is passed on when it is
// complete.
class Utf8Repair {
 public:
  void push(std::string_view bytes, std::string& out);
  void finish(std::string& out);  // what is pending is cut off: U+FFFD; ready for the next text

 private:
  std::string pending_;
  int missing_ = 0;
  unsigned char low_ = 0, high_ = 0;  // range of the next byte
};

}  // namespace infemeral::tok
