#include "engine/draft.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <set>

#include "tests/test_random.h"

namespace infemeral {
namespace {

using Ids = std::vector<std::int32_t>;

Ids random_ids(std::size_t n, std::uint32_t vocab) {
  Ids ids(n);
  for (auto& id : ids) id = static_cast<std::int32_t>(rng()() % vocab);
  return ids;
}

// Draft by draft, from the sentence in the header: endings from the longest down, each looked for
// from the end.
Ids expected_draft(Ids history, std::size_t most) {
  const std::size_t n = history.size();
  for (std::size_t length = std::min<std::size_t>(8, n); length >= 2; --length) {
    const Ids ending(history.end() - static_cast<std::ptrdiff_t>(length), history.end());
    const auto stood =
        std::find_end(history.begin(), history.end() - 1, ending.begin(), ending.end());
    if (stood == history.end() - 1) continue;
    const std::size_t period = n - static_cast<std::size_t>(stood - history.begin()) - length;
    for (std::size_t i = 0; i < most; ++i) history.push_back(history[history.size() - period]);
    return {history.begin() + static_cast<std::ptrdiff_t>(n), history.end()};
  }
  return {};
}

}  // namespace

TEST_CASE("guesses are what followed the longest ending that stood before, the last time") {
  CHECK(draft_tokens(Ids{}, 4).empty());
  CHECK(draft_tokens(Ids{7, 7}, 4).empty());
  CHECK(draft_tokens(Ids{1, 2, 3, 9, 3}, 4).empty());  // one token is no ending
  CHECK(draft_tokens(Ids{1, 2, 5, 6, 1, 2, 8, 1, 2}, 2) == Ids{8, 1});
  CHECK(draft_tokens(Ids{4, 1, 2, 5, 6, 1, 2, 8, 4, 1, 2}, 3) == Ids{5, 6, 1});
  CHECK(draft_tokens(Ids{7, 7, 7}, 3) == Ids{7, 7, 7});
  CHECK(draft_tokens(Ids{3, 1, 2, 1, 2}, 5) == Ids{1, 2, 1, 2, 1});
  CHECK(draft_tokens(Ids{1, 2, 5, 1, 2}, 0).empty());

  std::set<std::size_t> sizes;
  for (int round = 0; round < 20000; ++round) {
    const Ids history = random_ids(rng()() % 60, 1 + rng()() % 6);
    const std::size_t most = rng()() % 12;
    const Ids draft = draft_tokens(history, most);
    CAPTURE(history, most);
    REQUIRE(draft == expected_draft(history, most));
    sizes.insert(draft.size());
  }
  CHECK(sizes.size() == 12);
}

TEST_CASE("guesses grow while they are right and are few after one that is not") {
  DraftLength length(10);
  CHECK(length.next() == 2);
  length.record(2, 2);
  CHECK(length.next() == 4);
  length.record(3, 3);  // not as many as there could have been
  CHECK(length.next() == 4);
  length.record(4, 4);
  length.record(8, 8);
  CHECK(length.next() == 10);
  length.record(10, 10);
  CHECK(length.next() == 10);
  length.record(10, 3);
  CHECK(length.next() == 3);
  length.record(3, 0);
  CHECK(length.next() == 1);
  length.record(1, 1);
  CHECK(length.next() == 2);

  CHECK(DraftLength(1).next() == 1);
  DraftLength none;
  none.record(0, 0);
  CHECK(none.next() == 0);
}

}  // namespace infemeral
