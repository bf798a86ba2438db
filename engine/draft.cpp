#include "engine/draft.h"

#include <algorithm>

namespace infemeral {
namespace {

constexpr std::size_t kShortestEnding = 2;
// An ending that is this long says as much as a longer one.
constexpr std::size_t kLongestEnding = 8;

}  // namespace

std::vector<std::int32_t> draft_tokens(std::span<const std::int32_t> history, std::size_t most) {
  std::vector<std::int32_t> draft;
  if (most == 0) return draft;  // who asks for none pays nothing
  const std::size_t n = history.size();
  // The ending stood before `found`.
  std::size_t longest = kShortestEnding - 1, found = n;
  for (std::size_t end = n; end-- > kShortestEnding && longest < kLongestEnding;) {
    if (history[end - 1] != history[n - 1]) continue;
    const std::size_t limit = std::min(end, kLongestEnding);
    std::size_t length = 1;
    while (length < limit && history[end - 1 - length] == history[n - 1 - length]) ++length;
    if (length > longest) {
      longest = length;
      found = end;
    }
  }
  if (found == n) return draft;
  draft.reserve(most);
  for (std::size_t i = 0; i < most; ++i) {
    const std::size_t from = found + i;
    draft.push_back(from < n ? history[from] : draft[from - n]);
  }
  return draft;
}

void DraftLength::record(std::size_t drafted, std::size_t accepted) {
  if (accepted < drafted) {
    next_ = std::max<std::size_t>(accepted, 1);
  } else if (drafted == next_) {  // and not cut short by the end of the text
    next_ = 2 * next_;
  }
  next_ = std::min(next_, most_);
}

}  // namespace infemeral
