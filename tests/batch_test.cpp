#include "tools/batch.h"

#include <catch2/catch.hpp>
#include <nlohmann/json.hpp>

namespace infemeral {
namespace {

std::string error_of(std::string_view line) {
  const auto items = parse_batch(line, "x.jsonl");
  REQUIRE(items.size() == 1);
  REQUIRE(!items[0].status.ok());
  return std::string(items[0].status.message());
}

}  // namespace

TEST_CASE("plain text: a prompt a line, blank lines and line ends left out") {
  const auto items =
      parse_batch("first\r\n\n  \nsecond {\"prompt\": 1}\n{brace\nlast", "prompts.txt");
  REQUIRE(items.size() == 4);
  CHECK(items[0].prompt == "first");
  CHECK(items[1].prompt == "second {\"prompt\": 1}");
  CHECK(items[2].prompt == "{brace");
  CHECK(items[3].prompt == "last");
  CHECK(items[3].index == 3);
}

TEST_CASE("JSON lines carry their own options; a bad line is an item with an error") {
  const auto items = parse_batch(
      R"({"id": "a", "prompt": "x", "max_tokens": 3, "temperature": 0.5, "top_k": 4, "seed": 9, "stop": ["\n", "END"]}
not json
{"messages": [{"role": "user", "content": "hi"}]}
)",
      "-");
  REQUIRE(items.size() == 3);
  CHECK(items[0].id == "a");
  CHECK(items[0].options.max_tokens == 3u);
  CHECK(items[0].options.temperature == 0.5f);
  CHECK(items[0].options.top_k == 4);
  CHECK(items[0].options.seed == 9u);
  CHECK(items[0].options.stop == std::vector<std::string>{"\n", "END"});
  CHECK(!items[1].status.ok());
  CHECK(items[1].status.message().find("not json") == absl::string_view::npos);
  REQUIRE(items[2].messages.size() == 1);
  CHECK(items[2].messages[0].content == "hi");
}

TEST_CASE("bad items are refused by field") {
  CHECK(error_of("[1]").find("object") != std::string::npos);
  CHECK(error_of("{}").find("prompt") != std::string::npos);
  CHECK(error_of(R"({"prompt": 1})").find("'prompt'") != std::string::npos);
  CHECK(error_of(R"({"prompt": "a", "colour": 1})").find("'colour'") != std::string::npos);
  CHECK(error_of(R"({"prompt": "a", "max_tokens": -1})").find("'max_tokens'") != std::string::npos);
  CHECK(error_of(R"({"prompt": "a", "max_tokens": 1e99})").find("'max_tokens'") !=
        std::string::npos);
  CHECK(error_of(R"({"prompt": "a", "seed": 1.5})").find("'seed'") != std::string::npos);
  CHECK(error_of(R"({"prompt": "a", "stop": ""})").find("'stop'") != std::string::npos);
  CHECK(
      error_of(R"({"prompt": "a", "messages": [{"role": "u", "content": "c"}]})").find("one of") !=
      std::string::npos);
  CHECK(error_of(R"({"messages": []})").find("'messages'") != std::string::npos);
  CHECK(error_of(R"({"messages": [{"role": "user"}]})").find("'messages'") != std::string::npos);
}

TEST_CASE("OpenAI batch lines: neutral fields pass, others are refused by name") {
  const std::string head =
      R"({"custom_id": "r1", "method": "POST", "url": "/v1/chat/completions", )";
  const auto items = parse_batch(
      head + R"("body": {"model": "m", "messages": [{"role": "user", "content": "hi"}], "n": 1,
"stream": false, "presence_penalty": 0, "max_tokens": 5, "response_format": {"type": "text"}}})",
      "x");
  // The line is cut in two above: both halves are bad lines, and neither is lost.
  CHECK(items.size() == 2);

  const auto one = parse_batch(
      head + R"("body": {"model": "m", "messages": [{"role": "user", "content": "hi"}], "n": 1, )" +
          R"("stream": false, "presence_penalty": 0, "max_tokens": 5}})",
      "x");
  REQUIRE(one.size() == 1);
  INFO(one[0].status.ToString());
  CHECK(one[0].status.ok());
  CHECK(one[0].id == "r1");
  CHECK(one[0].kind == BatchItem::Kind::kOpenAiChat);
  CHECK(one[0].options.max_tokens == 5u);

  CHECK(error_of(head + R"("body": {"messages": [{"role": "user", "content": "hi"}], "n": 2}})")
            .find("'n'") != std::string::npos);
  CHECK(error_of(head + R"("body": {"prompt": "x"}})").find("do not fit") != std::string::npos);
  CHECK(error_of(R"({"custom_id": "a", "url": "/v1/embeddings", "body": {}})").find("'url'") !=
        std::string::npos);
  CHECK(error_of(R"({"custom_id": "a", "url": "/v1/completions"})").find("'body'") !=
        std::string::npos);
  CHECK(error_of(R"({"custom_id": 5})").find("'custom_id'") != std::string::npos);
}

TEST_CASE("result lines: ours, and OpenAI's for OpenAI items") {
  TextResult result;
  result.text = "hello \xF0\x9F\x98\x80";
  result.stopped = true;
  result.generation.tokens = {1, 2, 3};
  BatchItem item{.index = 4, .id = "x", .prompt = "bad utf8 \xFF"};
  auto json = nlohmann::json::parse(result_line(item, "m", 7, result, absl::OkStatus()));
  CHECK(json["index"] == 4);
  CHECK(json["id"] == "x");
  CHECK(json["text"] == result.text);
  CHECK(json["finish_reason"] == "stop");
  CHECK(json["prompt_tokens"] == 7);
  CHECK(json["output_tokens"] == 3);

  json =
      nlohmann::json::parse(result_line(item, "m", 0, {}, absl::InvalidArgumentError("too long")));
  CHECK(json["error"]["message"] == "too long");
  CHECK(!json.contains("text"));

  item.kind = BatchItem::Kind::kOpenAiChat;
  json = nlohmann::json::parse(result_line(item, "m", 7, result, absl::OkStatus()));
  CHECK(json["custom_id"] == "x");
  CHECK(json["error"].is_null());
  const auto& body = json["response"]["body"];
  CHECK(json["response"]["status_code"] == 200);
  CHECK(body["object"] == "chat.completion");
  CHECK(body["choices"][0]["message"]["content"] == result.text);
  CHECK(body["choices"][0]["finish_reason"] == "stop");
  CHECK(body["usage"]["total_tokens"] == 10);
  json = nlohmann::json::parse(result_line(item, "m", 0, {}, absl::InternalError("x")));
  CHECK(json["response"].is_null());
  CHECK(json["error"]["code"] == "engine_error");
}

}  // namespace infemeral
