#include "engine/token_subset.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <catch2/catch.hpp>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <set>

#include "tests/test_random.h"
#include "tests/tiny_model.h"

namespace infemeral {
namespace {

// Two special tokens, <end> 0 and <turn> 1, then the letters a..z from 2 on.
std::unique_ptr<const Tokenizer> letter_tokenizer() {
  nlohmann::json vocab = {{"<end>", 0}, {"<turn>", 1}}, added = nlohmann::json::array();
  for (const char* content : {"<end>", "<turn>"}) {
    added.push_back({{"id", vocab[content]},
                     {"content", content},
                     {"single_word", false},
                     {"lstrip", false},
                     {"rstrip", false},
                     {"normalized", false},
                     {"special", true}});
  }
  for (char c = 'a'; c <= 'z'; ++c) vocab[std::string(1, c)] = 2 + (c - 'a');
  const nlohmann::json byte_level = {{"type", "ByteLevel"},
                                     {"add_prefix_space", false},
                                     {"trim_offsets", true},
                                     {"use_regex", true}};
  const nlohmann::json root = {{"version", "1.0"},
                               {"added_tokens", added},
                               {"normalizer", nullptr},
                               {"pre_tokenizer", byte_level},
                               {"post_processor", nullptr},
                               {"decoder", byte_level},
                               {"model",
                                {{"type", "BPE"},
                                 {"unk_token", nullptr},
                                 {"byte_fallback", false},
                                 {"vocab", vocab},
                                 {"merges", nlohmann::json::array()}}}};
  auto tokenizer = Tokenizer::parse(root.dump());
  INFO(tokenizer.status().ToString());
  REQUIRE(tokenizer.ok());
  return *std::move(tokenizer);
}

ClientManifest manifest_of(std::size_t vocab_size) {
  ClientManifest manifest{.vocab_size = vocab_size};
  for (std::uint8_t& byte : manifest.model_fingerprint) byte = static_cast<std::uint8_t>(rng()());
  return manifest;
}

}  // namespace

TEST_CASE("the most frequent tokens, one taken after the other by the obvious rule") {
  for (int round = 0; round < 300; ++round) {
    const std::size_t vocab = 1 + random_index(60), size = 1 + random_index(70);
    std::vector<std::int32_t> text(random_index(200)), always(random_index(8));
    // Some outside the vocabulary, on both sides; few different ones, so that counts are equal.
    for (auto* ids : {&text, &always}) {
      for (std::int32_t& id : *ids) id = static_cast<std::int32_t>(random_index(vocab + 4)) - 2;
    }
    const auto valid = [&](std::int32_t id) {
      return id >= 0 && id < static_cast<std::int32_t>(vocab);
    };
    std::set<std::int32_t> expected;
    for (std::int32_t id : always) {
      if (valid(id)) expected.insert(id);
    }
    while (expected.size() < std::min(size, vocab)) {
      std::int32_t best = -1;
      std::ptrdiff_t best_count = -1;
      for (std::int32_t id = 0; id < static_cast<std::int32_t>(vocab); ++id) {
        const auto count = std::count(text.begin(), text.end(), id);
        if (expected.contains(id) || count <= best_count) continue;
        best = id;
        best_count = count;
      }
      expected.insert(best);
    }
    CAPTURE(round, vocab, size, text, always);
    const auto ids = most_frequent_tokens(text, always, vocab, size);
    REQUIRE(ids == std::vector<std::int32_t>(expected.begin(), expected.end()));
  }
}

TEST_CASE("counting a text: special and end tokens belong to the subset, and the text is plain") {
  const auto tokenizer = letter_tokenizer();
  const std::vector<std::int32_t> end = {9};  // h, in no text below
  const auto subset = count_tokens(*tokenizer, end,
                                   "zzzzyyyxx"
                                   "abc",
                                   28, 6);
  REQUIRE(subset.ok());
  CHECK(subset->ids == std::vector<std::int32_t>{0, 1, 9, 25, 26, 27});
  CHECK(subset->text_tokens == 12);
  CHECK(subset->covered == 9);

  // The special tokens are there anyway, however small the subset; the vocabulary bounds it.
  CHECK(count_tokens(*tokenizer, end, "z", 28, 1)->ids == std::vector<std::int32_t>{0, 1, 9});
  CHECK(count_tokens(*tokenizer, end, "z", 28, 1000)->ids.size() == 28);
  // An lm_head with more rows than the tokenizer has tokens, or fewer.
  CHECK(count_tokens(*tokenizer, end, "z", 40, 1000)->ids.size() == 40);
  CHECK(count_tokens(*tokenizer, end, "z", 5, 1000)->ids.size() == 5);
  CHECK(count_tokens(*tokenizer, end, "z", 28, 1)->covered == 0);

  CHECK(absl::IsInvalidArgument(count_tokens(*tokenizer, end, "", 28, 6).status()));
  CHECK(absl::IsInvalidArgument(count_tokens(*tokenizer, end, "z", 28, 0).status()));
  CHECK_FALSE(count_tokens(*tokenizer, end, "?", 28, 6).ok());  // no token, no unknown token
}

TEST_CASE("a subset is read as it was written, and written again over the old one") {
  const TempFolder temp;
  std::filesystem::create_directories(temp.path());
  for (int round = 0; round < 20; ++round) {
    const ClientManifest manifest = manifest_of(1 + random_index(5000));
    std::set<std::int32_t> ids;
    for (std::size_t i = 0; i <= random_index(manifest.vocab_size); ++i) {
      ids.insert(static_cast<std::int32_t>(random_index(manifest.vocab_size)));
    }
    const std::vector<std::int32_t> list(ids.begin(), ids.end());
    REQUIRE(save_token_subset(list, manifest, temp.path()).ok());
    const auto loaded = load_token_subset(manifest, temp.path());
    INFO(loaded.status().ToString());
    REQUIRE(loaded.ok());
    REQUIRE(*loaded == list);
  }
  CHECK_FALSE(save_token_subset({}, manifest_of(3), temp.path() / "nowhere").ok());
}

TEST_CASE("a subset that is missing, foreign or damaged is refused, with the way to make it") {
  const TempFolder temp;
  std::filesystem::create_directories(temp.path());
  const auto file = temp.path() / "subset.json";
  const ClientManifest manifest = manifest_of(100);
  const auto status_of = [&] { return load_token_subset(manifest, temp.path()).status(); };
  const std::string command = "engine_prep --output " + temp.path().string() + " --token-counts";
  const auto check = [&](absl::StatusCode code, const std::string& words) {
    const absl::Status status = status_of();
    INFO(status.ToString());
    CHECK(status.code() == code);
    const std::string message(status.message());
    CHECK(message.find(words) != std::string::npos);
    CHECK(message.find(command) != std::string::npos);
    CHECK(message.find('\n') == std::string::npos);
  };
  check(absl::StatusCode::kNotFound, "holds no token counts");

  const std::vector<std::int32_t> ids = {0, 5, 7, 99};
  REQUIRE(save_token_subset(ids, manifest, temp.path()).ok());
  std::string text;
  std::getline(std::ifstream(file), text);
  const nlohmann::json good = nlohmann::json::parse(text);

  constexpr auto kDamaged = absl::StatusCode::kDataLoss;
  constexpr auto kForeign = absl::StatusCode::kFailedPrecondition;
  struct Case {
    const char* what;
    std::function<void(nlohmann::json&)> spoil;
    absl::StatusCode code;
    const char* words;
  };
  const auto set = [](const char* name, nlohmann::json value) {
    return [=](nlohmann::json& json) { json[name] = value; };
  };
  const Case cases[] = {
      {"another version", set("format_version", 2), kForeign, "version 2"},
      {"a version in words", set("format_version", "1"), kDamaged, "format_version"},
      {"another model", set("model_fingerprint", std::string(64, '0')), kForeign, "another model"},
      {"a cut fingerprint", set("model_fingerprint", "00"), kDamaged, "model_fingerprint"},
      {"another vocabulary", set("vocab_size", 101), kDamaged, "vocab_size"},
      {"a vocabulary in words", set("vocab_size", "100"), kDamaged, "vocab_size"},
      {"no ids", set("ids", nlohmann::json::array()), kDamaged, "ids"},
      {"ids that are no list", set("ids", 5), kDamaged, "ids"},
      {"ids in an object", set("ids", {{"0", 5}}), kDamaged, "ids"},
      {"one id too many", set("ids", {0, 5, 6, 7, 99}), kDamaged, "count"},
      {"one id too few", set("ids", {0, 5, 7}), kDamaged, "count"},
      {"a count in words", set("count", "4"), kDamaged, "count"},
      {"a negative count", set("count", -4), kDamaged, "count"},
      {"a duplicate", set("ids", {0, 5, 5, 99}), kDamaged, "ascending"},
      {"another order", set("ids", {0, 7, 5, 99}), kDamaged, "ascending"},
      {"an id outside", set("ids", {0, 5, 7, 100}), kDamaged, "no id below 100"},
      {"a negative id", set("ids", {-1, 5, 7, 99}), kDamaged, "no id below 100"},
      {"an id that wraps around", set("ids", {0, 5, 7, 4294967297ull}), kDamaged, "no id"},
      {"an id that wraps around twice", set("ids", {0, 5, 7, 18446744073709551615ull}), kDamaged,
       "no id"},
      {"half an id", set("ids", {0, 5, 7.5, 99}), kDamaged, "no id"},
      {"an id in words", set("ids", {0, 5, "7", 99}), kDamaged, "no id"},
      {"no id at all", set("ids", {0, 5, nullptr, 99}), kDamaged, "no id"},
  };
  for (const Case& c : cases) {
    INFO(c.what);
    nlohmann::json bad = good;
    c.spoil(bad);
    std::ofstream(file) << bad;
    check(c.code, c.words);
  }
  for (const auto& [name, value] : good.items()) {
    nlohmann::json bad = good;
    bad.erase(name);
    INFO("without " << name);
    std::ofstream(file) << bad;
    check(kDamaged, "subset.json");
    bad[name] = nullptr;
    std::ofstream(file) << bad;
    check(kDamaged, "subset.json");
  }
  for (std::size_t size = 0; size < text.size(); ++size) {  // cut at every byte
    std::ofstream(file) << text.substr(0, size);
    check(kDamaged, "not valid JSON");
  }
  for (const char* other : {"[]", "null", "7", "\"\xff\""}) {
    std::ofstream(file) << other;
    check(kDamaged, "subset.json");
  }
  nlohmann::json later = good;
  later["unknown"] = "fields of later versions do not matter";
  std::ofstream(file) << later;
  CHECK(load_token_subset(manifest, temp.path()).value() == ids);
}

}  // namespace infemeral
