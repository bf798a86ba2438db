#include "engine/tokenizer.h"
#include "tests/test_random.h"

#include <catch2/catch.hpp>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace infemeral {
namespace {

using Json = nlohmann::json;
using Ids = std::vector<std::int32_t>;

Json added(const std::string& content, int id, bool special = true) {
  return {{"id", id}, {"content", content}, {"special", special}, {"normalized", false}};
}

Json byte_level(bool use_regex) {
  return {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", use_regex}};
}

// The GPT-2 alphabet as ids 0 to 255 (in byte order), a few merges, two special tokens.
Json byte_level_document() {
  Json vocabulary;
  int printable = 0x100;
  for (int byte = 0; byte < 256; ++byte) {
    const bool itself =
        (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
    const int c = itself ? byte : printable++;
    std::string name;
    if (c < 0x80) {
      name = static_cast<char>(c);
    } else {
      name = {static_cast<char>(0xC0 | c >> 6), static_cast<char>(0x80 | (c & 0x3F))};
    }
    vocabulary[name] = byte;
  }
  const std::vector<std::string> merges = {"a a", "aa aa", "h e", "l l", "he ll", "hell o", "Ġ Ġ"};
  int id = 256;
  for (std::string merge : merges) {
    merge.erase(merge.find(' '), 1);
    vocabulary[merge] = id++;
  }
  return {{"added_tokens", {added("<|a|>", 263), added("<|b|>", 264), added("<t>", 265, false)}},
          {"normalizer", nullptr},
          {"pre_tokenizer", byte_level(true)},
          {"decoder", byte_level(true)},
          {"model", {{"type", "BPE"}, {"vocab", vocabulary}, {"merges", merges}}}};
}

// <unk> <s> </s>, 256 byte tokens, a few characters and merges; Llama 2's normaliser and decoder.
Json byte_fallback_document() {
  Json vocabulary = {{"<unk>", 0}, {"<s>", 1}, {"</s>", 2}};
  for (int byte = 0; byte < 256; ++byte) {
    char name[8];
    std::snprintf(name, sizeof(name), "<0x%02X>", byte);
    vocabulary[name] = 3 + byte;
  }
  int id = 259;
  for (const char* token : {"▁", "a", "b", "é", "ab", "▁ab", "▁▁"}) vocabulary[token] = id++;
  const Json template_a = {{"type", "TemplateProcessing"},
                           {"single",
                            {{{"SpecialToken", {{"id", "<s>"}, {"type_id", 0}}}},
                             {{"Sequence", {{"id", "A"}, {"type_id", 0}}}},
                             {{"SpecialToken", {{"id", "</s>"}, {"type_id", 0}}}}}},
                           {"special_tokens", {{"<s>", {{"ids", {1}}}}, {"</s>", {{"ids", {2}}}}}}};
  return {{"added_tokens", {added("<unk>", 0), added("<s>", 1), added("</s>", 2)}},
          {"normalizer",
           {{"type", "Sequence"},
            {"normalizers",
             {{{"type", "Prepend"}, {"prepend", "▁"}},
              {{"type", "Replace"}, {"pattern", {{"String", " "}}}, {"content", "▁"}}}}}},
          {"post_processor", template_a},
          {"decoder",
           {{"type", "Sequence"},
            {"decoders",
             {{{"type", "Replace"}, {"pattern", {{"String", "▁"}}}, {"content", " "}},
              {{"type", "ByteFallback"}},
              {{"type", "Fuse"}},
              {{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}}}}}},
          {"model",
           {{"type", "BPE"},
            {"vocab", vocabulary},
            {"merges", Json::parse(R"([["a","b"],["▁","ab"],["▁","▁"]])")},
            {"byte_fallback", true},
            {"fuse_unk", true},
            {"unk_token", "<unk>"}}}};
}

std::unique_ptr<const Tokenizer> parsed(const Json& document) {
  auto tokenizer = Tokenizer::parse(document.dump());
  INFO(tokenizer.status().message());
  REQUIRE(tokenizer.ok());
  return *std::move(tokenizer);
}

Ids encoded(const Tokenizer& tokenizer, std::string_view text, bool special = false) {
  const auto ids =
      tokenizer.encode(text, {.add_special_tokens = special, .parse_special = special});
  INFO(ids.status().message());
  REQUIRE(ids.ok());
  return *ids;
}

std::string streamed(const Tokenizer& tokenizer, const Ids& ids, bool skip) {
  StreamDecoder decoder(tokenizer, skip);
  std::string text;
  for (std::int32_t id : ids) {
    const std::string piece = decoder.push(id);
    // Whole characters: a piece neither starts with a continuation byte nor ends inside one.
    if (!piece.empty()) {
      CHECK((static_cast<unsigned char>(piece[0]) & 0xC0) != 0x80);
      std::size_t last = piece.size() - 1;
      while ((static_cast<unsigned char>(piece[last]) & 0xC0) == 0x80) --last;
      const auto lead = static_cast<unsigned char>(piece[last]);
      CHECK(piece.size() - last == (lead < 0x80 ? 1u : lead < 0xE0 ? 2u : lead < 0xF0 ? 3u : 4u));
    }
    text += piece;
  }
  return text + decoder.finish();
}

}  // namespace

TEST_CASE("byte-level text is merged by rank and comes back") {
  const auto tokenizer = parsed(byte_level_document());
  CHECK(tokenizer->vocab_size() == 266);
  CHECK(encoded(*tokenizer, "hello").size() == 1);
  CHECK(encoded(*tokenizer, "") == Ids{});
  CHECK(encoded(*tokenizer, "aaaaa") == Ids{*tokenizer->token_id("aaaa"), 'a'});
  CHECK(encoded(*tokenizer, "it's") == Ids{'i', 't', '\'', 's'});
  const std::string text = "hello  wörld\n\t日本 👨‍👩‍👧 \x01";
  CHECK(tokenizer->decode(encoded(*tokenizer, text), false) == text);
}

TEST_CASE("byte fallback follows Llama 2") {
  const auto tokenizer = parsed(byte_fallback_document());
  CHECK(encoded(*tokenizer, "ab") == Ids{264});
  CHECK(encoded(*tokenizer, "ab", true) == Ids{1, 264, 2});
  CHECK(encoded(*tokenizer, "é日") == Ids{259, 262, 3 + 0xE6, 3 + 0x97, 3 + 0xA5});
  for (const std::string text : {"ab  ab", " a", "日本 é\n", "👍🏽"}) {
    CHECK(tokenizer->decode(encoded(*tokenizer, text), true) == text);
  }
  // One bad byte spoils its run, as in Hugging Face: a replacement character for each byte.
  CHECK(tokenizer->decode(Ids{3 + 0xE6, 3 + 0x97, 260}, false) == "\uFFFD\uFFFDa");
  CHECK(tokenizer->decode(Ids{3 + 0xC3, 3 + 0xA9, 3 + 0xFF}, false) == "\uFFFD\uFFFD\uFFFD");
}

TEST_CASE("special-token text is text unless asked for") {
  const auto tokenizer = parsed(byte_level_document());
  CHECK(encoded(*tokenizer, "<|a|>") == Ids{'<', '|', 'a', '|', '>'});
  CHECK(encoded(*tokenizer, "x<|a|><|b|>", true) == Ids{'x', 263, 264});
  CHECK(encoded(*tokenizer, "<t>") == Ids{265});  // added, not special: always
  CHECK(tokenizer->is_special(263));
  CHECK(!tokenizer->is_special(265));
  CHECK(!tokenizer->is_special(-1));
  CHECK(tokenizer->token_id("<|b|>") == 264);
  CHECK(tokenizer->token_id("<|c|>") == std::nullopt);
  CHECK(tokenizer->decode(Ids{263, 'x', 265}, false) == "<|a|>x<t>");
  CHECK(tokenizer->decode(Ids{263, 'x', 265}, true) == "x<t>");
  CHECK(tokenizer->decode(Ids{-1, 'x', 100000}, false) == "x");
}

TEST_CASE("in segments, trusted text alone makes special tokens") {
  const auto tokenizer = parsed(byte_level_document());
  const auto ids = [&](std::vector<Tokenizer::Segment> segments) {
    const auto result = tokenizer->encode_segments(segments, false);
    REQUIRE(result.ok());
    return *result;
  };
  const std::string text = "hello <|a|> <t>";
  CHECK(ids({{text, true}}) == encoded(*tokenizer, text, true));
  CHECK(ids({{text, false}}) == encoded(*tokenizer, text, false));
  CHECK(ids({{"<|a|>", true}, {"<|a|>", false}, {"<|b|>", true}}) ==
        Ids{263, '<', '|', 'a', '|', '>', 264});
  // A token half in untrusted text is none, on either side and in the middle.
  CHECK(ids({{"<|", true}, {"a|>", false}}) == encoded(*tokenizer, "<|a|>"));
  CHECK(ids({{"<|a", false}, {"|>", true}}) == encoded(*tokenizer, "<|a|>"));
  CHECK(ids({{"<|", true}, {"a", false}, {"|>", true}}) == encoded(*tokenizer, "<|a|>"));
  CHECK(ids({{"<|", true}, {"a|>", true}}) == Ids{263});
  // What is between the tokens is one text: "hello" is merged across the border.
  CHECK(ids({{"<|a|>he", true}, {"llo", false}}) == Ids{263, *tokenizer->token_id("hello")});
  CHECK(ids({{"", true}, {"", false}}) == Ids{});
}

TEST_CASE("the first occurrence wins, of those the longest") {
  Json document = byte_level_document();
  document["added_tokens"] = {added("ab", 263, false), added("abc", 264, false),
                              added("bcde", 265, false)};
  const auto tokenizer = parsed(document);
  CHECK(encoded(*tokenizer, "abcde") == Ids{264, 'd', 'e'});
  CHECK(encoded(*tokenizer, "xbcdeab") == Ids{'x', 265, 263});
}

TEST_CASE("added tokens strip and guard as their flags say") {
  Json document = byte_level_document();
  Json left = added("<l>", 263), right = added("<r>", 264), word = added("in", 265);
  left["lstrip"] = right["rstrip"] = word["single_word"] = true;
  document["added_tokens"] = {left, right, word};
  const auto tokenizer = parsed(document);
  CHECK(encoded(*tokenizer, "a \u3000\n<l> a", true) == Ids{'a', 263, ' ', 'a'});
  CHECK(encoded(*tokenizer, "a <r> \u00A0\ta", true) == Ids{'a', ' ', 264, 'a'});
  CHECK(encoded(*tokenizer, "in", true) == Ids{265});
  CHECK(encoded(*tokenizer, "-in.", true) == Ids{'-', 265, '.'});
  CHECK(encoded(*tokenizer, "bin", true) == Ids{'b', 'i', 'n'});
  CHECK(encoded(*tokenizer, "in\u0301", true).size() == 4);
}

TEST_CASE("each maximal invalid subpart becomes one replacement character") {
  const auto tokenizer = parsed(byte_level_document());
  const auto repaired = [&](std::string_view bytes) {
    return tokenizer->decode(encoded(*tokenizer, bytes), false);
  };
  const std::string fffd = "\uFFFD";
  CHECK(repaired("a\x80z") == "a" + fffd + "z");
  CHECK(repaired("\xE2\x82") == fffd);
  CHECK(repaired("\xF0\x9F\x98z") == fffd + "z");
  CHECK(repaired("\xED\xA0\x80") == fffd + fffd + fffd);  // a surrogate
  CHECK(repaired("\xC0\xAF") == fffd + fffd);             // overlong
  CHECK(repaired("\xF4\x90\x80\x80") == fffd + fffd + fffd + fffd);
  CHECK(repaired("\xE2\x82\xE2\x82\xAC") == fffd + "\u20AC");
  CHECK(repaired("\xF0\x9F\x98\xF0\x9F\x98\x80") == fffd + "\U0001F600");
}

TEST_CASE("streaming gives what decode gives, in whole characters") {
  for (const Json& document : {byte_level_document(), byte_fallback_document()}) {
    const auto tokenizer = parsed(document);
    std::uniform_int_distribution<std::int32_t> any(
        -1, static_cast<std::int32_t>(tokenizer->vocab_size()));
    for (int round = 0; round < 300; ++round) {
      Ids ids(rng()() % 40);
      for (std::int32_t& id : ids) id = any(rng());
      // A readable stretch inside, so that characters of several bytes come up too.
      const Ids word = encoded(*tokenizer, "né日👍🏽 x");
      ids.insert(ids.begin() + static_cast<std::ptrdiff_t>(ids.size() / 2), word.begin(),
                 word.end());
      for (const bool skip : {false, true}) {
        CHECK(streamed(*tokenizer, ids, skip) == tokenizer->decode(ids, skip));
      }
    }
  }
}

TEST_CASE("a character comes when it is complete, and a cut one at the end") {
  const auto tokenizer = parsed(byte_level_document());
  StreamDecoder decoder(*tokenizer, true);
  CHECK(decoder.push(0xF0) == "");
  CHECK(decoder.push(0x9F) == "");
  CHECK(decoder.push(0x98) == "");
  CHECK(decoder.push(0x80) == "\U0001F600");
  CHECK(decoder.push(0xE2) == "");
  CHECK(decoder.push('a') == "\uFFFDa");
  CHECK(decoder.push(0xC3) == "");
  CHECK(decoder.finish() == "\uFFFD");
  CHECK(decoder.push('b') == "b");  // finish starts afresh
  CHECK(decoder.finish() == "");
}

TEST_CASE("a megabyte of one thing takes seconds at most") {
  Json llama3 = byte_level_document();
  llama3["pre_tokenizer"] = {
      {"type", "Sequence"},
      {"pretokenizers",
       {{{"type", "Split"},
         {"pattern",
          {{"Regex",
            R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)"}}},
         {"behavior", "Isolated"},
         {"invert", false}},
        byte_level(false)}}};
  llama3["normalizer"] = {{"type", "NFC"}};
  for (const Json& document : {byte_level_document(), byte_fallback_document(), llama3}) {
    const auto tokenizer = parsed(document);
    // Two marks of different class, in the wrong order: normalising has to sort all of them.
    for (const std::string unit :
         {"a", " ", "\n", "\U0001F600", "\u0301\u0323", "é", "\xFF", "<", "'"}) {
      std::string text;
      while (text.size() < (1u << 20)) text += unit;
      const auto start = std::chrono::steady_clock::now();
      const auto ids = tokenizer->encode(text);
      const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
      INFO(unit << ": " << ids.status().message());
      REQUIRE(ids.ok());
      CHECK(seconds.count() < 20);  // quadratic would be hours
    }
  }
}

TEST_CASE("a pattern that backtracks without end is an error, not a wrong split") {
  Json document = byte_level_document();
  document["pre_tokenizer"] = {
      {"type", "Split"}, {"pattern", {{"Regex", R"((?:a|a|aa)+\p{N})"}}}, {"behavior", "Isolated"}};
  const auto tokenizer = parsed(document);
  const auto ids = tokenizer->encode(std::string(5000, 'a'));
  CHECK(ids.status().code() == absl::StatusCode::kResourceExhausted);
}

TEST_CASE("one tokenizer serves several threads") {
  const auto tokenizer = parsed(byte_level_document());
  const std::string text = "hello 日本 it's 12 👍🏽 <|a|>";
  const Ids expected = encoded(*tokenizer, text, true);
  std::vector<int> wrong(4, 0);
  std::vector<std::thread> threads;
  for (int& count : wrong) {
    threads.emplace_back([&] {
      for (int i = 0; i < 200; ++i) {
        const auto ids =
            tokenizer->encode(text, {.add_special_tokens = true, .parse_special = true});
        count += !ids.ok() || *ids != expected || tokenizer->decode(*ids, false) != text;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (int count : wrong) CHECK(count == 0);
}

TEST_CASE("damaged and hostile files are refused with their reason") {
  using absl::StatusCode;
  const auto refused = [](const std::string& text, StatusCode code, const std::string& part) {
    const auto result = Tokenizer::parse(text);
    INFO(text.substr(0, 200) << "\n" << result.status().message());
    CHECK(result.status().code() == code);
    CHECK(std::string(result.status().message()).find(part) != std::string::npos);
    CHECK(result.status().message().size() < 400);
  };
  refused("", StatusCode::kInvalidArgument, "JSON");
  refused("nonsense", StatusCode::kInvalidArgument, "JSON");
  refused("[]", StatusCode::kInvalidArgument, "object");
  refused("{}", StatusCode::kInvalidArgument, "model");
  refused(std::string(1 << 20, '['), StatusCode::kInvalidArgument, "nested");
  refused("{\"a\":" + std::string(1 << 20, '{'), StatusCode::kInvalidArgument, "nested");
  refused("{\"a\": \"\xFF\"}", StatusCode::kInvalidArgument, "JSON");
  refused("{\"a\": \"" + std::string(1 << 20, 'x'), StatusCode::kInvalidArgument, "JSON");
  const std::string whole = byte_fallback_document().dump();
  for (std::size_t cut = 0; cut < whole.size(); cut += 97) {
    refused(whole.substr(0, cut), StatusCode::kInvalidArgument, "JSON");
  }

  struct Case {
    const char* pointer;
    const char* value;
    StatusCode code;
    const char* part;
  };
  constexpr auto kInvalid = StatusCode::kInvalidArgument;
  constexpr auto kUnsupported = StatusCode::kUnimplemented;
  const std::vector<Case> cases = {
      {"/model", "null", kInvalid, "model"},
      {"/model", "[1]", kInvalid, "model"},
      {"/model/type", "\"Unigram\"", kUnsupported, "Unigram"},
      {"/model/type", "7", kInvalid, "type"},
      {"/model/vocab", "[]", kInvalid, "vocab"},
      {"/model/vocab", "{}", kInvalid, "vocab"},
      {"/model/vocab/a", "-1", kInvalid, "id of token"},
      {"/model/vocab/a", "1.5", kInvalid, "id of token"},
      {"/model/vocab/a", "\"1\"", kInvalid, "id of token"},
      {"/model/vocab/a", "2147483647", kInvalid, "id of token"},
      {"/model/vocab/a", "2147483648", kInvalid, "id of token"},
      {"/model/vocab/a", "18446744073709551615", kInvalid, "id of token"},
      {"/model/vocab/a", "0", kInvalid, "same id"},
      {"/model/merges", "null", kInvalid, "merges"},
      {"/model/merges", "{}", kInvalid, "merges"},
      {"/model/merges/0", "\"ab\"", kInvalid, "merges[0]"},
      {"/model/merges/0", "\"a b c\"", kInvalid, "merges[0]"},
      {"/model/merges/0", "[\"a\"]", kInvalid, "merges[0]"},
      {"/model/merges/0", "[\"a\", 1]", kInvalid, "merges[0]"},
      {"/model/merges/1", "\"a nowhere\"", kInvalid, "nowhere"},
      {"/model/merges/1", "\"b a\"", kInvalid, "ba"},
      {"/model/dropout", "0.1", kUnsupported, "dropout"},
      {"/model/byte_fallback", "1", kInvalid, "byte_fallback"},
      {"/model/continuing_subword_prefix", "\"##\"", kUnsupported, "continuing_subword_prefix"},
      {"/model/end_of_word_suffix", "\"</w>\"", kUnsupported, "end_of_word_suffix"},
      {"/model/unk_token", "3", kInvalid, "unk_token"},
      {"/normalizer", "3", kInvalid, "normalizer"},
      {"/normalizer/type", "\"Precompiled\"", kUnsupported, "Precompiled"},
      {"/normalizer/normalizers/0/type", "\"BertNormalizer\"", kUnsupported, "normalizers[0]"},
      {"/normalizer/normalizers/1/pattern", "{\"Regex\": \"a\"}", kUnsupported, "pattern"},
      {"/normalizer/normalizers/1/pattern", "{\"String\": \"\"}", kInvalid, "empty"},
      {"/pre_tokenizer", "{\"type\": \"BertPreTokenizer\"}", kUnsupported, "BertPreTokenizer"},
      {"/pre_tokenizer", "{\"type\": \"Metaspace\", \"replacement\": \"ab\"}", kInvalid,
       "one char"},
      {"/pre_tokenizer", "{\"type\": \"Metaspace\", \"replacement\": \"_\", \"prepend_scheme\": 1}",
       kInvalid, "prepend_scheme"},
      {"/pre_tokenizer", "{\"type\": \"Sequence\", \"pretokenizers\": 3}", kInvalid, "not a list"},
      {"/pre_tokenizer",
       "{\"type\": \"Split\", \"pattern\": {\"Regex\": \"a\"}, \"behavior\": \"Odd\"}", kInvalid,
       "Odd"},
      {"/decoder", "{\"type\": \"WordPiece\"}", kUnsupported, "WordPiece"},
      {"/decoder", "{\"type\": \"Strip\", \"content\": \"ab\", \"start\": 0, \"stop\": 0}",
       kInvalid, "one char"},
      {"/decoder", "{\"type\": \"Strip\", \"content\": \"a\", \"start\": -1, \"stop\": 0}",
       kInvalid, "start"},
      {"/post_processor/type", "\"BertProcessing\"", kUnsupported, "BertProcessing"},
      {"/post_processor/single/0/SpecialToken/id", "\"<x>\"", kInvalid, "<x>"},
      {"/post_processor/single/1/Sequence/id", "\"B\"", kUnsupported, "sequence"},
      {"/post_processor/special_tokens/<s>/ids", "[70000]", kInvalid, "70000"},
      {"/post_processor/special_tokens/<s>/ids", "[-1]", kInvalid, "token id"},
      {"/added_tokens", "{}", kInvalid, "added_tokens"},
      {"/added_tokens/0", "3", kInvalid, "added_tokens[0]"},
      {"/added_tokens/0/id", "7", kInvalid, "added_tokens[0]"},
      {"/added_tokens/0/id", "-7", kInvalid, "id"},
      {"/added_tokens/0/id", "4294967296", kInvalid, "out of range"},
      {"/added_tokens/0/content", "\"<new>\"", kInvalid, "<new>"},
      {"/added_tokens/0/special", "\"yes\"", kInvalid, "special"},
      {"/added_tokens/1/content", "\"<unk>\"", kInvalid, "added_tokens[1]"},
  };
  for (const Case& c : cases) {
    Json document = byte_fallback_document();
    document[Json::json_pointer(c.pointer)] = Json::parse(c.value);
    refused(document.dump(), c.code, c.part);
  }
  Json long_token = byte_fallback_document();
  long_token["added_tokens"].push_back(added(std::string(600, 'x'), 266));
  refused(long_token.dump(), kUnsupported, "longer than");
}

TEST_CASE("regular expressions that would mean something else here are refused") {
  const auto code = [](const std::string& pattern) {
    Json document = byte_level_document();
    document["pre_tokenizer"] = {
        {"type", "Split"}, {"pattern", {{"Regex", pattern}}}, {"behavior", "Isolated"}};
    return Tokenizer::parse(document.dump()).status().code();
  };
  for (const char* pattern :
       {"\\p{Han}", "\\w+", "\\b",   "\\h",     "[[:alpha:]]", "[a&&b]",  "[^\\P{L}]",
        "^a",       "a$",   "(?m)a", "a(?i)b",  "(?<n>a)",     "(a)\\1",  "a{2}?",
        "a{1,2}+",  "a{,}", "{",     "(*UCP)a", "[]a]",        "[a-\\s]", "[\\s-a]",
        "\\K",      "\\R",  "\\xFF", "\\u00",   "\\p{^L}",     "\\pL"}) {
    INFO(pattern);
    CHECK(code(pattern) == absl::StatusCode::kUnimplemented);
  }
  for (const char* pattern :
       {"(", "a)", "[a", "*", "a\\", "a**", "[z-a]", "\\x{110000}", "(?:a{60000}){60000}"}) {
    INFO(pattern);
    CHECK(code(pattern) == absl::StatusCode::kInvalidArgument);
  }
  CHECK(code(std::string(20000, 'a')) == absl::StatusCode::kResourceExhausted);
}

TEST_CASE("white space in a pattern is Unicode's White_Space, also inside and negated") {
  // U+0085 is White_Space, U+180E was until Unicode 6.3 and still is to PCRE2's \s.
  for (const char* pattern : {"\\s", "[\\s]", "[^\\S]", "[^\\Sx]", "[\\sx]"}) {
    Json document = byte_level_document();
    document["pre_tokenizer"] = {
        {"type", "Sequence"},
        {"pretokenizers",
         {{{"type", "Split"}, {"pattern", {{"Regex", pattern}}}, {"behavior", "Removed"}},
          byte_level(false)}}};
    const auto tokenizer = parsed(document);
    INFO(pattern);
    CHECK(encoded(*tokenizer,
                  "\u0085\t\n\v\f\r \u00A0\u1680\u2000\u200A\u2028\u2029\u202F\u205F\u3000")
              .empty());
    CHECK(tokenizer->decode(encoded(*tokenizer, "a\u180E\u200B b\x1F"), false) ==
          "a\u180E\u200Bb\x1F");
  }
}

TEST_CASE("an unknown character without an unknown token is said, not swallowed") {
  Json document = byte_fallback_document();
  document["model"]["byte_fallback"] = false;
  document["model"]["unk_token"] = "<none>";
  const auto tokenizer = parsed(document);
  CHECK(tokenizer->encode("ab").ok());
  CHECK(tokenizer->encode("z").status().code() == absl::StatusCode::kFailedPrecondition);
}

TEST_CASE("a file that is not there is not found") {
  const auto result = Tokenizer::load("/nonexistent/tokenizer.json");
  CHECK(result.status().code() == absl::StatusCode::kNotFound);
  CHECK(std::string(result.status().message()).find("tokenizer.json") != std::string::npos);
}

TEST_CASE("a file that cannot be opened is not a missing one") {
  const auto folder = std::filesystem::temp_directory_path() / "infemeral_tokenizer_test";
  std::filesystem::remove_all(folder);
  std::filesystem::create_directories(folder);
  const auto file = folder / "tokenizer.json";
  std::filesystem::create_symlink(file, file);  // a loop: closed even to root
  const auto result = Tokenizer::load(file);
  CHECK(result.status().code() == absl::StatusCode::kDataLoss);
  CHECK(std::string(result.status().message()).find("cannot open " + file.string() + ": ") == 0);
  std::filesystem::remove_all(folder);
}

}  // namespace infemeral
