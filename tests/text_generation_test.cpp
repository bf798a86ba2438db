#include "engine/text_generation.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>

#include "tests/tiny_model.h"

namespace infemeral {
namespace {

using Json = nlohmann::json;
using Ids = std::vector<std::int32_t>;

constexpr std::int32_t kEndOfText = 257, kTurnBegins = 258, kTurnEnds = 259, kPlainAdded = 260;

// A ChatML model whose generation_config.json names only the base model's end token.
TextAssets chat_assets(const std::filesystem::path& folder) {
  Json vocabulary = {{"<unk>", 256}};
  for (int byte = 0; byte < 256; ++byte) {
    char name[8];
    std::snprintf(name, sizeof(name), "<0x%02X>", byte);
    vocabulary[name] = byte;
  }
  Json added = Json::array();
  int id = kEndOfText;
  for (const char* content : {"<|endoftext|>", "<|im_start|>", "<|im_end|>", "<plain>"}) {
    added.push_back(
        {{"id", id}, {"content", content}, {"special", id != kPlainAdded}, {"normalized", false}});
    ++id;
  }
  std::ofstream(folder / "tokenizer.json") << Json{{"added_tokens", added},
                                                   {"decoder", {{"type", "ByteFallback"}}},
                                                   {"model",
                                                    {{"type", "BPE"},
                                                     {"vocab", vocabulary},
                                                     {"merges", Json::array()},
                                                     {"byte_fallback", true}}}};
  std::ofstream(folder / "tokenizer_config.json") << Json{
      {"chat_template",
       "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + "
       "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
       "{{ '<|im_start|>assistant\n' }}{% endif %}"}};
  std::ofstream(folder / "generation_config.json") << Json{{"eos_token_id", kEndOfText}};
  auto assets = TextAssets::load(folder);
  INFO(assets.status().message());
  REQUIRE(assets.ok());
  return *std::move(assets);
}

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

TEST_CASE("a chat ends with its turn, other text with the model's end token") {
  TempFolder temp;
  const TextAssets assets = chat_assets(temp.path());
  const auto ends = [&](const Ids& prompt, bool ignore) {
    return TextJob(assets, {.prompt = prompt, .ignore_end_tokens = ignore}, {})
        .job.request.end_tokens;
  };
  const auto chat = assets.encode_chat(std::vector<ChatMessage>{{"user", "hi"}});
  const auto text = assets.encode_prompt("<|im_start|>user\nhi<|im_end|>\n");
  REQUIRE(chat.ok());
  REQUIRE(text.ok());
  CHECK(ends(*chat, false) == Ids{kEndOfText, kTurnEnds});
  CHECK(ends(*text, false) == Ids{kEndOfText});
  CHECK(ends(*chat, true) == Ids{});
}

TEST_CASE("a stop string that is a special token ends the text where the token comes") {
  TempFolder temp;
  const TextAssets assets = chat_assets(temp.path());
  const auto ends = [&](std::vector<std::string> stop) {
    return TextJob(assets, {.prompt = {'a'}, .stop = std::move(stop), .ignore_end_tokens = true},
                   {})
        .job.request.end_tokens;
  };
  CHECK(ends({"END", "<|im_end|>", "a"}) == Ids{kTurnEnds});
  CHECK(ends({"<|im_start|>", "<|im_end|>"}) == Ids{kTurnBegins, kTurnEnds});
  CHECK(ends({"<|im_end|> ", "<plain>", "<unk>"}) == Ids{});

  // Spelled in other tokens, or as an added token that is text, it is a stop string as any other.
  const auto text_of = [&](const std::string& stop, const Ids& tokens) {
    TextJob text(assets, {.prompt = {'a'}, .stop = {stop}}, {});
    for (std::int32_t token : tokens) text.job.on_token(token);
    text.finish();
    CHECK(text.result.stopped);
    return text.result.text;
  };
  CHECK(text_of("<plain>", {'o', 'k', kPlainAdded}) == "ok");
  CHECK(text_of("<|im_end|>", *assets.encode_prompt("ok<|im_end|>")) == "ok");
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
