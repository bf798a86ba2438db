// Regular expressions as tokenizer.json writes them, run by PCRE2.
#pragma once

#include <cstddef>
#include <memory>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace infemeral::tok {

// What a match writes to: one per thread, reusable with any Regex.
class MatchScratch {
 public:
  MatchScratch();
  ~MatchScratch();
  MatchScratch(const MatchScratch&) = delete;
  MatchScratch& operator=(const MatchScratch&) = delete;

 private:
  friend class Regex;
  struct Handles;
  std::unique_ptr<Handles> handles_;
};

// The pattern is in Oniguruma's Ruby syntax, Hugging Face's; it is translated, and what would mean
// something else in PCRE2 is refused. Supported: literals, groups that do not capture or that
// nothing refers to, lookaround, atomic groups, (?i:...), classes, \s \S \d \D, \p{..} and \P{..}
// with general categories, quantifiers. Immutable and safe to share between threads.
class Regex {
 public:
  // InvalidArgument: not a pattern. Unimplemented: outside the subset, naming the construct.
  static absl::StatusOr<Regex> compile(std::string_view pattern);

  struct Match {
    std::size_t begin;
    std::size_t end;
  };
  // The leftmost match in text at or after `from`; false: there is none. `text` is valid UTF-8.
  // ResourceExhausted when the pattern backtracks past the limit on this text.
  absl::StatusOr<bool> find(std::string_view text, std::size_t from, MatchScratch& scratch,
                            Match& match) const;

 private:
  struct Code;
  explicit Regex(std::shared_ptr<const Code> code) : code_(std::move(code)) {}
  std::shared_ptr<const Code> code_;
};

}  // namespace infemeral::tok
