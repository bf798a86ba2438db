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

  // What clients write for what is not set, and a content in parts.
  const auto two = parse_batch(
      head +
          R"("body": {"messages": [{"role": "user", "content": [{"type": "text", "text": "h"}, )" +
          R"({"type": "text", "text": "i"}]}], "temperature": null, "max_tokens": null, )" +
          R"("seed": null, "stop": null, "logit_bias": null}})",
      "x");
  REQUIRE(two.size() == 1);
  INFO(two[0].status.ToString());
  CHECK(two[0].status.ok());
  CHECK(two[0].messages.at(0).content == "hi");
  CHECK(!two[0].options.temperature.has_value());
  CHECK(error_of(head + R"("body": {"messages": [{"role": "user", "content": )" +
                 R"([{"type": "image_url", "image_url": {"url": "u"}}]}]}})")
            .find("'messages'") != std::string::npos);
  CHECK(error_of(R"({"prompt": "x", "temperature": null})").find("'temperature'") !=
        std::string::npos);

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

TEST_CASE("what an earlier run left: whole lines count, a cut one does not, others' are refused") {
  const auto items = parse_batch(
      R"({"prompt": "a"}
{"prompt": "b", "id": "second"}
{"messages": [{"role": "user", "content": "hi"}]}
{"custom_id": "r", "url": "/v1/chat/completions", "body": {"messages": [{"role": "user", "content": "hi"}]}}
{"prompt": 5}
)",
      "x.jsonl");
  REQUIRE(items.size() == 5);
  TextResult result;
  result.text = "made\nhere";
  std::vector<std::string> lines;
  for (const BatchItem& item : items) {
    lines.push_back(result_line(item, "m", 3, result, item.status) + "\n");
  }
  const auto all = read_results(lines[0] + lines[1] + lines[2] + lines[3] + lines[4], items);
  REQUIRE(all.ok());
  CHECK(all->n_finished == 5);
  CHECK(read_results("", items)->n_finished == 0);

  // Cut at every byte, in any order of lines.
  const std::string text = lines[3] + lines[1] + lines[2];
  for (std::size_t size = 0; size <= text.size(); ++size) {
    const auto cut = read_results(std::string_view(text).substr(0, size), items);
    INFO(size << " " << cut.status());
    REQUIRE(cut.ok());
    std::size_t whole = 0, bytes = 0;
    bool unended = false;
    for (const std::size_t i : {3, 1, 2}) {
      const std::size_t end = bytes + lines[i].size();
      if (size + 1 < end) break;
      unended = size + 1 == end;  // all but the newline is there
      bytes = std::min(size, end);
      ++whole;
      CHECK(cut->finished[i]);
      if (unended) break;
    }
    CHECK(cut->n_finished == whole);
    CHECK(cut->bytes == bytes);
    CHECK(cut->unended == unended);
  }

  const auto refused = [&](const std::string& results, int line) {
    const auto status = read_results(results, items).status();
    return absl::IsInvalidArgument(status) &&
           status.message().find("line " + std::to_string(line) + " ") != absl::string_view::npos;
  };
  CHECK(refused("not json\n", 1));
  CHECK(refused(lines[0] + "\n" + lines[1], 2));
  CHECK(refused(lines[0] + "{}\n", 2));
  CHECK(refused(R"({"index": 0, "prompt": "another", "text": ""})", 1));
  CHECK(refused(R"({"index": 1, "id": "third", "prompt": "b", "text": ""})", 1));
  CHECK(refused(R"({"index": 5, "prompt": "a", "text": ""})", 1));
  CHECK(refused(R"({"index": -1, "prompt": "a", "text": ""})", 1));
  CHECK(refused(R"({"id": "batch_req_3", "custom_id": "q"})", 1));
  CHECK(refused(R"({"id": "batch_req_3x", "custom_id": "r"})", 1));
}

}  // namespace infemeral
