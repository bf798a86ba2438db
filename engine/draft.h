// Guesses of the tokens that come next, from what the text has said before: prompt lookup decoding
// (https://github.com/apoorvumang/prompt-lookup-decoding). Code, quotations, tables and names
// repeat themselves.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace infemeral {

// Up to `most` tokens that followed the history's ending where it stood before: the longest ending
// that did, the last time that it did. Text that repeats is continued as if it went on so. Empty
// where not even the last two tokens stood together before. Takes some 1 us for 1,000 tokens.
std::vector<std::int32_t> draft_tokens(std::span<const std::int32_t> history, std::size_t most);

// How many tokens are worth guessing. A wrong guess costs its row on the line, in the body and in
// the head; after one, guesses begin small again.
class DraftLength {
 public:
  DraftLength() = default;  // none
  explicit DraftLength(std::size_t most) : most_(most), next_(most < 2 ? most : 2) {}

  std::size_t next() const { return next_; }
  // Of the last guesses: how many there were, and how many of them, from the first on, were right.
  void record(std::size_t drafted, std::size_t accepted);

 private:
  std::size_t most_ = 0, next_ = 0;
};

}  // namespace infemeral
