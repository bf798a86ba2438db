#include "engine/tokenizer_regex.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/tokenizer_unicode.h"

namespace infemeral::tok {
namespace {

constexpr std::size_t kMaxPatternBytes = 16384;  // real ones have a few hundred
constexpr std::size_t kJitStackStart = 32 << 10;
constexpr std::size_t kJitStackMax = 64 << 20;

// Translates Oniguruma's Ruby syntax to PCRE2's, character by character. Every construct that is
// not known to mean the same in both, or is not rewritten here, ends the translation.
class Translator {
 public:
  explicit Translator(std::string_view pattern) : in_(pattern) {}

  absl::StatusOr<std::string> run() {
    if (starts_with("(?i)")) take("(?i)");  // elsewhere its reach differs between the two
    while (status_.ok() && pos_ < in_.size()) item();
    if (!status_.ok()) return status_;
    return std::move(out_);
  }

 private:
  bool starts_with(std::string_view s) const { return in_.substr(pos_).starts_with(s); }
  char peek(std::size_t ahead = 0) const {
    return pos_ + ahead < in_.size() ? in_[pos_ + ahead] : '\0';
  }
  void take(std::string_view s) {
    out_ += s;
    pos_ += s.size();
  }
  void refuse(std::string_view what) {
    status_ = absl::UnimplementedError(absl::StrCat("the regular expression uses ",
                                                    std::string(what), " at byte ", pos_,
                                                    ", which this tokenizer does not support"));
  }
  void emit_char(char32_t c) { absl::StrAppendFormat(&out_, "\\x{%X}", static_cast<unsigned>(c)); }
  void emit_range(char32_t first, char32_t last) {
    emit_char(first);
    if (first != last) {
      out_ += '-';
      emit_char(last);
    }
  }

  void item() {
    const char c = peek();
    if (c == '\\') {
      escape(false);
    } else if (c == '[') {
      char_class();
    } else if (c == '(') {
      group();
    } else if (c == '{') {
      braces();
    } else if (c == '^' || c == '$') {
      refuse("the anchor ^ or $");  // Ruby's are per line
    } else {
      out_ += c;
      ++pos_;
    }
  }

  void group() {
    for (std::string_view start : {"(?:", "(?=", "(?!", "(?<=", "(?<!", "(?>", "(?i:", "(?-i:"}) {
      if (starts_with(start)) return take(start);
    }
    if (peek(1) == '?' || peek(1) == '*') return refuse("a special group");
    take("(");
  }

  // {n}, {n,}, {,m}, {n,m}. Ruby reads {n}? and {n,m}+ differently from PCRE2.
  void braces() {
    const std::size_t close = in_.find('}', pos_);
    if (close == std::string_view::npos) return refuse("a lone {");
    const std::string_view inside = in_.substr(pos_ + 1, close - pos_ - 1);
    const std::size_t comma = inside.find(',');
    for (char c : inside) {
      if (c != ',' && !absl::ascii_isdigit(c)) return refuse("a { that is no repetition");
    }
    if (inside.empty() || inside == "," || inside.find(',', comma + 1) < inside.size()) {
      return refuse("a { that is no repetition");
    }
    pos_ = close + 1;
    if (peek() == '+' || (peek() == '?' && comma == std::string_view::npos)) {
      return refuse("a second repetition sign after {..}");
    }
    absl::StrAppend(&out_, "{", comma == 0 ? "0" : "", std::string(inside), "}");
  }

  void char_class() {
    take("[");
    if (peek() == '^') take("^");
    if (peek() == ']') return refuse("a character class that starts with ]");
    const std::size_t first = pos_;
    while (status_.ok()) {
      const char c = peek();
      if (pos_ >= in_.size()) {
        status_ = absl::InvalidArgumentError("the regular expression has a [ without its ]");
      } else if (c == ']') {
        return take("]");
      } else if (c == '[') {
        refuse("a class inside a class");
      } else if (starts_with("&&")) {
        refuse("the class intersection &&");
      } else if (c == '\\') {
        const bool after_dash = pos_ > first + 1 && in_[pos_ - 1] == '-' && in_[pos_ - 2] != '\\';
        if (escape(true) && (after_dash || (peek() == '-' && peek(1) != ']'))) {
          refuse("a set as the end of a range");
        }
      } else {
        out_ += c;
        ++pos_;
      }
    }
  }

  // An escape at pos_. True when it stood for a set of characters.
  bool escape(bool in_class) {
    const char c = peek(1);
    if (c == '\0') {
      status_ = absl::InvalidArgumentError("the regular expression ends in a backslash");
      return false;
    }
    constexpr std::string_view kNames = "tnrfvae";
    constexpr std::string_view kMeant = "\t\n\r\f\v\a\x1B";
    if (const std::size_t i = kNames.find(c); i < kNames.size()) {
      pos_ += 2;
      emit_char(static_cast<unsigned char>(kMeant[i]));
      return false;
    }
    switch (c) {
      case 's':
      case 'S':
        pos_ += 2;
        white_space(c == 'S', in_class);
        return true;
      case 'd':
      case 'D':
        pos_ += 2;
        category("Nd", c == 'D', in_class);
        return true;
      case 'p':
      case 'P':
        property(c == 'P', in_class);
        return true;
      case 'x':
      case 'u':
        code_point();
        return false;
      default:
        break;
    }
    if (absl::ascii_isalnum(static_cast<unsigned char>(c))) {
      refuse(absl::StrCat("\\", std::string(1, c)));
    } else {
      take(in_.substr(pos_, 2));  // of a longer character the other bytes follow as literals
    }
    return false;
  }

  void code_point() {
    const bool braced = peek(1) == 'x' && peek(2) == '{';
    std::size_t begin = pos_ + (braced ? 3 : 2);
    std::size_t end = begin;
    const std::size_t longest = braced ? 6 : peek(1) == 'x' ? 2 : 4;
    std::uint32_t value = 0;
    while (end < in_.size() && end < begin + longest &&
           absl::ascii_isxdigit(static_cast<unsigned char>(in_[end]))) {
      const char digit = absl::ascii_tolower(static_cast<unsigned char>(in_[end++]));
      value =
          value * 16 + static_cast<std::uint32_t>(digit <= '9' ? digit - '0' : digit - 'a' + 10);
    }
    const bool complete =
        braced ? end > begin && end < in_.size() && in_[end] == '}' : end == begin + longest;
    // Two digits above 7F are a raw byte to Oniguruma, not a character.
    if (!complete || (!braced && longest == 2 && value > 0x7F)) return refuse("this \\x or \\u");
    pos_ = end + (braced ? 1 : 0);
    emit_char(value);
  }

  void white_space(bool negated, bool in_class) {
    if (!in_class) out_ += negated ? "[^" : "[";
    char32_t next = 0;
    for (const CodePointRange& range : white_space_ranges()) {
      if (!(negated && in_class)) {
        emit_range(range.first, range.last);
      } else {
        emit_range(next, range.first - 1);
        next = range.last + 1;
      }
    }
    if (negated && in_class) {
      emit_range(next, 0xD7FF);
      emit_range(0xE000, 0x10FFFF);
    }
    if (!in_class) out_ += ']';
  }

  void property(bool negated, bool in_class) {
    const std::size_t close = in_.find('}', pos_);
    if (peek(2) != '{' || close == std::string_view::npos) return refuse("this \\p");
    const std::string_view name = in_.substr(pos_ + 3, close - pos_ - 3);
    constexpr std::string_view kCategories =
        " L Lu Ll Lt Lm Lo M Mn Mc Me N Nd Nl No P Pc Pd Ps Pe Pi Pf Po S Sm Sc Sk So Z Zs Zl Zp ";
    if (name.find(' ') < name.size() ||
        kCategories.find(absl::StrCat(" ", std::string(name), " ")) == std::string_view::npos) {
      return refuse("a \\p{..} other than a general category");
    }
    pos_ = close + 1;
    category(name, negated, in_class);
  }

  void category(std::string_view name, bool negated, bool in_class) {
    if (negated && in_class) return refuse("\\P or \\D inside a class");
    if (!in_class) out_ += negated ? "[^" : "[";
    absl::StrAppend(&out_, "\\p{", std::string(name), "}");
    for (const CategoryRange& range : categories_since_unicode_14()) {
      const std::string_view added(range.category.data(), range.category.size());
      if (added.starts_with(name)) emit_range(range.first, range.last);
    }
    if (!in_class) out_ += ']';
  }

  std::string_view in_;
  std::size_t pos_ = 0;
  std::string out_;
  absl::Status status_;
};

}  // namespace

struct Regex::Code {
  ~Code() { pcre2_code_free(code); }
  pcre2_code* code = nullptr;
};

struct MatchScratch::Handles {
  ~Handles() {
    pcre2_match_context_free(context);
    pcre2_match_data_free(data);
    pcre2_jit_stack_free(stack);
  }
  pcre2_match_data* data = pcre2_match_data_create(1, nullptr);
  pcre2_match_context* context = pcre2_match_context_create(nullptr);
  pcre2_jit_stack* stack = nullptr;  // made when the 32 KiB on the machine stack do not do
};

MatchScratch::MatchScratch() : handles_(std::make_unique<Handles>()) {}
MatchScratch::~MatchScratch() = default;

absl::StatusOr<Regex> Regex::compile(std::string_view pattern) {
  if (pattern.size() > kMaxPatternBytes) {
    return absl::ResourceExhaustedError(
        absl::StrCat("a regular expression is longer than ", kMaxPatternBytes, " bytes"));
  }
  absl::StatusOr<std::string> translated = Translator(pattern).run();
  if (!translated.ok()) return translated.status();

  pcre2_compile_context* context = pcre2_compile_context_create(nullptr);
  if (context == nullptr) return absl::ResourceExhaustedError("out of memory");
  pcre2_set_newline(context, PCRE2_NEWLINE_LF);
  int error = 0;
  PCRE2_SIZE offset = 0;
  auto code = std::make_shared<Code>();
  code->code =
      pcre2_compile(reinterpret_cast<PCRE2_SPTR>(translated->data()), translated->size(),
                    PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C, &error, &offset, context);
  pcre2_compile_context_free(context);
  if (code->code == nullptr) {
    PCRE2_UCHAR message[120];
    if (pcre2_get_error_message(error, message, sizeof(message)) < 0) message[0] = '\0';
    return absl::InvalidArgumentError(absl::StrCat("a regular expression is not valid: ",
                                                   reinterpret_cast<const char*>(message)));
  }
  // Without JIT (unsupported machine, no executable memory) pcre2_match interprets instead.
  pcre2_jit_compile(code->code, PCRE2_JIT_COMPLETE);
  return Regex(std::move(code));
}

absl::StatusOr<bool> Regex::find(std::string_view text, std::size_t from, MatchScratch& scratch,
                                 Match& match) const {
  MatchScratch::Handles& handles = *scratch.handles_;
  if (handles.data == nullptr || handles.context == nullptr) {
    return absl::ResourceExhaustedError("out of memory");
  }
  // The plain cost of a long run is linear in the text; more than that is a pattern gone wild.
  const std::size_t limit = 10'000'000 + 16 * text.size();
  pcre2_set_match_limit(handles.context,
                        static_cast<std::uint32_t>(std::min<std::size_t>(limit, UINT32_MAX)));
  const auto run = [&] {
    return pcre2_match(code_->code, reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), from,
                       PCRE2_NO_UTF_CHECK, handles.data, handles.context);
  };
  int result = run();
  if (result == PCRE2_ERROR_JIT_STACKLIMIT && handles.stack == nullptr) {
    handles.stack = pcre2_jit_stack_create(kJitStackStart, kJitStackMax, nullptr);
    pcre2_jit_stack_assign(handles.context, nullptr, handles.stack);
    result = run();
  }
  if (result == PCRE2_ERROR_NOMATCH) return false;
  if (result < 0) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "the tokenizer's regular expression gave up on this text (PCRE2 error ", result, ")"));
  }
  const PCRE2_SIZE* bounds = pcre2_get_ovector_pointer(handles.data);
  // \K in a lookahead could turn them round; the translator lets no \K through.
  match = {bounds[0], bounds[1]};
  return true;
}

}  // namespace infemeral::tok
