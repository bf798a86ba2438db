#include "engine/text_generation.h"

#include <catch2/catch.hpp>
#include <random>

namespace infemeral {
namespace {

std::string filtered(const std::vector<std::string>& stops,
                     const std::vector<std::string>& pieces) {
  StopFilter filter(stops);
  std::string shown;
  for (const std::string& piece : pieces) {
    if (!filter.stopped()) shown += filter.push(piece);
  }
  return shown + filter.finish();
}

}  // namespace

TEST_CASE("text ends at the first stop string, wherever the pieces are cut") {
  const std::string text = "one two\nthree END four";
  static std::mt19937 rng{std::random_device{}()};
  for (int round = 0; round < 200; ++round) {
    std::vector<std::string> pieces;
    for (std::size_t i = 0; i < text.size();) {
      const std::size_t n = 1 + rng() % 6;
      pieces.push_back(text.substr(i, n));
      i += n;
    }
    CHECK(filtered({"END"}, pieces) == "one two\nthree ");
    CHECK(filtered({"END", "\n"}, pieces) == "one two");
    CHECK(filtered({"four!", ""}, pieces) == text);
    CHECK(filtered({"ee E", "END"}, pieces) == "one two\nthr");
    CHECK(filtered({}, pieces) == text);
  }
}

TEST_CASE("what may become a stop string is held back, and no character is cut") {
  StopFilter filter({"\xE2\x82\xAC\xE2\x82\xAC"});  // two euro signs
  CHECK(filter.push("price \xE2\x82\xAC") == "price ");
  CHECK(filter.push("5") ==
        "\xE2\x82\xAC"
        "5");
  CHECK(filter.push("\xE2\x82\xAC") == "");
  CHECK(filter.push("\xE2\x82\xAC") == "");
  CHECK(filter.stopped());
  CHECK(filter.push("more") == "");
  CHECK(filter.finish() == "");
}

}  // namespace infemeral
