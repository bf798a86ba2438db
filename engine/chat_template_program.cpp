#include "engine/chat_template_program.h"

#include <algorithm>
#include <array>
#include <optional>
#include <utility>

#include "absl/status/status.h"
#include "engine/text.h"

namespace infemeral {
namespace {

using Kind = TemplateStep::Kind;

constexpr std::size_t kMaxTokens = 100'000;  // real programs have some 2,000
constexpr std::size_t kMaxDepth = 64;        // of ifs and loops, and of a condition's brackets

// Hugging Face passes messages and add_generation_prompt, and None or nothing for the rest. The
// dates are those of a template without strftime_now, so that a prompt does not depend on the day.
constexpr std::array kNever = std::to_array<std::string_view>({
    "tools",
    "tools is not none",
    "tools|length>0",
    "custom_tools",
    "custom_tools is defined",
    "builtin_tools",
    "builtin_tools is defined",
    "documents",
    "message.tool_calls",
    "message.tool_calls is defined",
    "\"tool_calls\"in message",
    "message.role==\"tool\"",
    "message.role==\"ipython\"",
    "message.role==\"tool_results\"",
    "message.reasoning_content",
    "message.reasoning_content is defined",
    "message.reasoning_content is string",
    "date_string is defined",
    "strftime_now is defined",
    "enable_thinking is defined",
});
constexpr std::array kAlways = std::to_array<std::string_view>({
    "tools is none",
    "add_generation_prompt is defined",
    "message.content is string",
    "message.content is defined",
});

bool is_space(char c) {
  return c == ' ' || c == '\n' || c == '\t' || c == '\r' || c == '\v' || c == '\f';
}
bool is_digit(char c) {
  return c >= '0' && c <= '9';
}
bool is_letter(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_';
}

struct Token {
  enum class Kind { kWord, kString, kSign };
  Kind kind;
  std::string text;  // a string's is unescaped

  bool word(std::string_view name) const { return kind == Kind::kWord && text == name; }
  bool sign(std::string_view name) const { return kind == Kind::kSign && text == name; }
};
using Tokens = std::vector<Token>;
using View = std::pair<Tokens::const_iterator, Tokens::const_iterator>;

// Thrown by the parts of Reader, which turns it into a status.
struct Unread {
  std::string what;
};

std::string quoted(std::string_view text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '\n') {
      out += "\\n";
    } else {
      if (c == '"' || c == '\\') out += '\\';
      out += c;
    }
  }
  return out += '"';
}

std::string spelled(View tokens) {
  std::string out;
  bool after_word = false;
  for (auto token = tokens.first; token != tokens.second; ++token) {
    const bool word = token->kind == Token::Kind::kWord;
    if (word && after_word) out += ' ';
    out += token->kind == Token::Kind::kString ? quoted(token->text) : token->text;
    after_word = word;
  }
  return out;
}

int bracket(const Token& token) {
  if (token.kind != Token::Kind::kSign) return 0;
  if (token.text == "(" || token.text == "[" || token.text == "{") return 1;
  return token.text == ")" || token.text == "]" || token.text == "}" ? -1 : 0;
}

// What is known of a condition in a chat of plain messages.
class Condition {
 public:
  static std::optional<bool> value(View tokens) {
    Condition condition{tokens};
    const std::optional<bool> value = condition.any(0);
    return condition.tokens_.first == tokens.second ? value : std::nullopt;
  }

 private:
  explicit Condition(View tokens) : tokens_(tokens) {}

  bool take(std::string_view word) {
    if (tokens_.first == tokens_.second || !tokens_.first->word(word)) return false;
    ++tokens_.first;
    return true;
  }
  std::optional<bool> any(std::size_t depth) {
    std::optional<bool> value = all(depth);
    while (take("or")) {
      const std::optional<bool> other = all(depth);
      if (value == true || other == true) {
        value = true;
      } else if (!value || !other) {
        value = std::nullopt;
      }
    }
    return value;
  }
  std::optional<bool> all(std::size_t depth) {
    std::optional<bool> value = one(depth);
    while (take("and")) {
      const std::optional<bool> other = one(depth);
      if (value == false || other == false) {
        value = false;
      } else if (!value || !other) {
        value = std::nullopt;
      }
    }
    return value;
  }
  std::optional<bool> one(std::size_t depth) {
    if (depth > kMaxDepth) throw Unread{"a condition of many brackets"};
    if (take("not")) {
      const std::optional<bool> value = one(depth + 1);
      return value ? std::optional<bool>(!*value) : std::nullopt;
    }
    // Up to the next "and" or "or" of this level.
    auto end = tokens_.first;
    for (int level = 0; end != tokens_.second; ++end) {
      if (level == 0 && (end->word("and") || end->word("or") || bracket(*end) < 0)) break;
      level += bracket(*end);
    }
    const View atom{std::exchange(tokens_.first, end), end};
    if (atom.first != end && atom.first->sign("(") && (end - 1)->sign(")")) {
      Condition inside({atom.first + 1, end - 1});
      const std::optional<bool> value = inside.any(depth + 1);
      if (inside.tokens_.first == end - 1) return value;
    }
    const std::string text = spelled(atom);
    if (std::find(kNever.begin(), kNever.end(), text) != kNever.end()) return false;
    if (std::find(kAlways.begin(), kAlways.end(), text) != kAlways.end()) return true;
    return std::nullopt;
  }

  View tokens_;
};

class Reader {
 public:
  explicit Reader(std::string_view source) : source_(source) {
    if (source_.ends_with('\n')) source_.remove_suffix(1);
  }

  std::vector<TemplateStep> read() {
    while (pos_ < source_.size()) {
      read_text();
      if (pos_ < source_.size()) read_tag();
    }
    if (!blocks_.empty()) throw Unread{"a block without an end"};
    return std::move(steps_);
  }

 private:
  struct Block {
    bool loop;
    bool live_outside;
    bool decided = false;  // an if of which a branch is always taken
    int branches = 0;      // that may be taken, so that the if is a step
    std::string condition;
    std::string guard;
  };

  // ---- steps ----

  void add(Kind kind, std::string text, std::vector<std::string> literals = {}) {
    if (!live_) return;
    if (kind == Kind::kText) {
      if (text.empty()) return;
      if (!steps_.empty() && steps_.back().kind == Kind::kText) {
        steps_.back().text += text;
        return;
      }
    }
    TemplateStep step{.kind = kind,
                      .text = std::move(text),
                      .guard = {},
                      .in_loop = false,
                      .literals = std::move(literals)};
    for (const Block& block : blocks_) {
      step.in_loop |= block.loop;
      if (!block.guard.empty()) step.guard = block.guard;
    }
    steps_.push_back(std::move(step));
  }

  // ---- text, with the white space control of Jinja ----

  void read_text() {
    std::size_t end = pos_;
    while (true) {
      end = source_.find('{', end);
      if (end == std::string_view::npos || end + 1 == source_.size()) {
        end = source_.size();
        break;
      }
      const char c = source_[end + 1];
      if (c == '{' || c == '%' || c == '#') break;
      ++end;
    }
    std::string_view text = source_.substr(pos_, end - pos_);
    pos_ = end;
    if (end < source_.size()) {
      const char control = end + 2 < source_.size() ? source_[end + 2] : ' ';
      if (control == '-') {
        while (!text.empty() && is_space(text.back())) text.remove_suffix(1);
      } else if (source_[end + 1] != '{' && control != '+') {
        const std::size_t line = text.rfind('\n') + 1;  // 0 where there is none
        const bool blank = std::all_of(text.begin() + static_cast<std::ptrdiff_t>(line), text.end(),
                                       [](char c) { return is_space(c); });
        if (blank && (line > 0 || line_begins_)) text = text.substr(0, line);
      }
    }
    add(Kind::kText, std::string(text));
  }

  // Behind a tag. `control` is the sign before its end, if any.
  void end_tag(char control, bool trim_newline) {
    const std::size_t begin = pos_;
    if (control == '-') {
      while (pos_ < source_.size() && is_space(source_[pos_])) ++pos_;
    } else if (trim_newline && control != '+' && pos_ < source_.size() && source_[pos_] == '\n') {
      ++pos_;
    }
    line_begins_ = pos_ > begin && source_[pos_ - 1] == '\n';
  }

  // ---- tags ----

  void read_tag() {
    const char type = source_[pos_ + 1];
    pos_ += 2;
    if (type == '#') {
      const std::size_t end = source_.find("#}", pos_);
      if (end == std::string_view::npos) throw Unread{"a comment without an end"};
      const char control = end > pos_ ? source_[end - 1] : ' ';
      pos_ = end + 2;
      return end_tag(control, true);
    }
    if (pos_ < source_.size() && (source_[pos_] == '-' || source_[pos_] == '+')) ++pos_;
    const std::string_view closing = type == '{' ? "}}" : "%}";
    tokens_.clear();
    int level = 0;
    while (true) {
      while (pos_ < source_.size() && is_space(source_[pos_])) ++pos_;
      const std::string_view rest = source_.substr(pos_);
      if (rest.empty()) throw Unread{"a tag without an end"};
      const bool controlled = rest[0] == '-' || rest[0] == '+';
      if (level == 0 && rest.substr(controlled ? 1 : 0).starts_with(closing)) {
        pos_ += closing.size() + (controlled ? 1 : 0);
        end_tag(controlled ? rest[0] : ' ', type == '%');
        break;
      }
      read_token();
      level += bracket(tokens_.back());
    }
    simplify();
    if (type == '{') {
      output({tokens_.begin(), tokens_.end()});
    } else {
      statement();
    }
  }

  void read_token() {
    if (++n_tokens_ > kMaxTokens) throw Unread{"a program of this length"};
    const char c = source_[pos_];
    std::size_t end = pos_ + 1;
    if (c == '\'' || c == '"') {
      std::string text;
      for (;; ++end) {
        if (end >= source_.size()) throw Unread{"a string without an end"};
        if (source_[end] == c) break;
        if (source_[end] == '\\') {
          const char escaped = ++end < source_.size() ? source_[end] : ' ';
          const std::size_t known = std::string_view("nt\\'\"").find(escaped);
          if (known == std::string_view::npos) throw Unread{"an unusual escape in a string"};
          text += "\n\t\\'\""[known];
        } else {
          text += source_[end];
        }
      }
      pos_ = end + 1;
      tokens_.push_back({Token::Kind::kString, std::move(text)});
      return;
    }
    Token::Kind kind = Token::Kind::kSign;
    if (is_letter(c) || is_digit(c)) {
      kind = Token::Kind::kWord;
      while (end < source_.size() && (is_letter(source_[end]) || is_digit(source_[end]))) ++end;
    } else if (const std::string_view two = source_.substr(pos_, 2);
               two == "==" || two == "!=" || two == "<=" || two == ">=") {
      ++end;
    }
    tokens_.push_back({kind, std::string(source_.substr(pos_, end - pos_))});
    pos_ = end;
  }

  // a["b"] is a.b, and strings that are added are one.
  void simplify() {
    Tokens out;
    const auto at = [&](std::size_t i) { return i < tokens_.size() ? &tokens_[i] : nullptr; };
    for (std::size_t i = 0; i < tokens_.size(); ++i) {
      const Token& token = tokens_[i];
      const Token* const next = at(i + 1);
      const bool is_name = next != nullptr && next->kind == Token::Kind::kString &&
                           !next->text.empty() && is_letter(next->text[0]) &&
                           std::all_of(next->text.begin(), next->text.end(),
                                       [](char c) { return is_letter(c) || is_digit(c); });
      if (token.sign("[") && !out.empty() &&
          (out.back().kind == Token::Kind::kWord || out.back().sign("]") || out.back().sign(")")) &&
          is_name && at(i + 2) != nullptr && at(i + 2)->sign("]")) {
        out.push_back({Token::Kind::kSign, "."});
        out.push_back({Token::Kind::kWord, next->text});
        i += 2;
        continue;
      }
      const Token* const behind = at(i + 2);
      const bool stands_alone = behind == nullptr || behind->sign("+") || bracket(*behind) < 0;
      const bool began_alone = out.size() < 2 || out[out.size() - 2].sign("+") ||
                               out[out.size() - 2].sign("=") || out[out.size() - 2].sign("(");
      if (token.sign("+") && next != nullptr && next->kind == Token::Kind::kString &&
          stands_alone && began_alone && !out.empty() && out.back().kind == Token::Kind::kString) {
        out.back().text += next->text;
        ++i;
        continue;
      }
      out.push_back(token);
    }
    tokens_ = std::move(out);
  }

  // A sum of strings is its terms, one after the other.
  void output(View tokens) {
    constexpr std::array kLooser =
        std::to_array<std::string_view>({"if", "and", "or", "not", "in", "is", "==", "!=", "<", ">",
                                         "<=", ">=", "-", "*", "/", "%"});
    int level = 0;
    bool is_sum = true;
    std::vector<View> terms = {{tokens.first, tokens.first}};
    for (auto token = tokens.first; token != tokens.second; ++token) {
      level += bracket(*token);
      if (level == 0 && token->kind != Token::Kind::kString &&
          std::find(kLooser.begin(), kLooser.end(), token->text) != kLooser.end()) {
        is_sum = false;
      }
      if (level == 0 && (token->sign("+") || token->sign("~"))) {
        terms.push_back({token + 1, token + 1});
      } else {
        terms.back().second = token + 1;
      }
    }
    if (!is_sum) terms = {tokens};
    for (const View& term : terms) {
      if (term.second - term.first == 1 && term.first->kind == Token::Kind::kString) {
        add(Kind::kText, term.first->text);
      } else {
        add(Kind::kOutput, spelled(term));
      }
    }
  }

  // ---- statements ----

  static std::vector<std::string> literals(View tokens) {
    std::vector<std::string> found;
    for (auto token = tokens.first; token != tokens.second; ++token) {
      if (token->kind == Token::Kind::kString) found.push_back(token->text);
    }
    return found;
  }

  void statement() {
    if (tokens_.empty()) throw Unread{"an empty statement"};
    const std::string name = tokens_[0].text;
    const View rest{tokens_.begin() + 1, tokens_.end()};
    if (name == "if") {
      begin({.loop = false, .live_outside = live_, .condition = {}, .guard = {}});
      branch(rest);
    } else if (name == "elif" || name == "else") {
      if (blocks_.empty() || blocks_.back().loop) throw Unread{"an else without an if"};
      name == "elif" ? branch(rest) : last_branch();
    } else if (name == "for") {
      const bool never = spelled(rest).ends_with(" in message.tool_calls");
      begin({.loop = true, .live_outside = live_, .condition = {}, .guard = {}});
      live_ = live_ && !never;
      add(Kind::kFor, spelled(rest));
    } else if (name == "endfor" || name == "endif") {
      if (blocks_.empty() || blocks_.back().loop != (name == "endfor")) {
        throw Unread{"blocks that do not match"};
      }
      const Block block = std::move(blocks_.back());
      blocks_.pop_back();
      if (block.loop) add(Kind::kMark, name);
      live_ = block.live_outside;
      if (!block.loop && block.branches > 0) add(Kind::kMark, name);
    } else if (name == "set") {
      if (live_ && std::none_of(rest.first, rest.second,
                                [](const Token& token) { return token.sign("="); })) {
        throw Unread{"a block that is set"};
      }
      add(Kind::kSet, spelled(rest), literals(rest));
    } else if (name == "generation" || name == "endgeneration") {
      add(Kind::kMark, name);
    } else if (live_ || name == "macro" || name == "raw") {
      throw Unread{cat("a \"", name, "\" statement")};
    }
  }

  void begin(Block block) {
    if (blocks_.size() == kMaxDepth) throw Unread{"blocks of this depth"};
    blocks_.push_back(std::move(block));
  }

  void branch(View condition) {
    Block& block = blocks_.back();
    const std::optional<bool> value = Condition::value(condition);
    if (value == true) return last_branch();
    live_ = block.live_outside && !block.decided && value != false;
    if (!live_) return;
    ++block.branches;
    block.condition = spelled(condition);
    block.guard = {};  // a condition does not guard itself
    add(block.branches == 1 ? Kind::kIf : Kind::kElif, block.condition, literals(condition));
    block.guard = block.condition;
  }

  // The one that is taken if none before it is.
  void last_branch() {
    Block& block = blocks_.back();
    live_ = block.live_outside && !block.decided;
    block.decided = true;
    if (!live_ || block.branches == 0) return;
    block.guard = {};
    add(Kind::kMark, "else");
    block.guard = block.branches == 1 ? cat("not ", block.condition) : "else";
  }

  std::string_view source_;
  std::size_t pos_ = 0;
  std::size_t n_tokens_ = 0;
  bool line_begins_ = true;
  bool live_ = true;
  Tokens tokens_;  // of the tag being read
  std::vector<Block> blocks_;
  std::vector<TemplateStep> steps_;
};

}  // namespace

absl::StatusOr<std::vector<TemplateStep>> read_template_program(std::string_view jinja) {
  try {
    return Reader(jinja).read();
  } catch (const Unread& unread) {
    return absl::UnimplementedError(cat("it has ", unread.what));
  }
}

std::string spell(const std::vector<TemplateStep>& program) {
  std::string out;
  for (const TemplateStep& step : program) {
    switch (step.kind) {
      case Kind::kText:
        out += cat("{{", quoted(step.text), "}}");
        break;
      case Kind::kOutput:
        out += step.text.starts_with("raise_exception(") ? "{{raise_exception()}}"
                                                         : cat("{{", step.text, "}}");
        break;
      case Kind::kSet:
        out += cat("{%set ", step.text, "%}");
        break;
      case Kind::kFor:
        out += cat("{%for ", step.text, "%}");
        break;
      case Kind::kIf:
        out += cat("{%if ", step.text, "%}");
        break;
      case Kind::kElif:
        out += cat("{%elif ", step.text, "%}");
        break;
      case Kind::kMark:
        out += cat("{%", step.text, "%}");
        break;
    }
  }
  return out;
}

}  // namespace infemeral
