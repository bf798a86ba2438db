#include "engine/chat_template.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace infemeral {
namespace {

using Json = nlohmann::json;

Json goldens() {
  std::ifstream file(INFEMERAL_SOURCE_DIR "/tests/chat_templates/goldens.json");
  REQUIRE(file.good());
  return Json::parse(file)["goldens"];
}

Json golden(const std::string& name) {
  for (Json& one : goldens()) {
    if (one["name"] == name) return one;
  }
  FAIL("no golden " << name);
  return {};
}

std::vector<ChatMessage> messages_of(const Json& list) {
  std::vector<ChatMessage> messages;
  for (const Json& message : list) messages.push_back({message["role"], message["content"]});
  return messages;
}

ChatTemplate parsed(const Json& config) {
  absl::StatusOr<ChatTemplate> result = ChatTemplate::parse(config.dump());
  INFO(result.status().message());
  REQUIRE(result.ok());
  return *std::move(result);
}

std::string config_with(const std::string& jinja) {
  return Json{{"bos_token", "<s>"}, {"chat_template", jinja}}.dump();
}

// Bytes as tokens, and the markup of all families as special tokens above them.
std::unique_ptr<const Tokenizer> byte_tokenizer() {
  Json vocabulary = {{"<unk>", 256}};
  for (int byte = 0; byte < 256; ++byte) {
    char name[8];
    std::snprintf(name, sizeof(name), "<0x%02X>", byte);
    vocabulary[name] = byte;
  }
  Json added = Json::array();
  int id = 257;
  for (const char* content :
       {"<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>",
        "<|end_header_id|>", "<s>", "</s>", "[INST]", "[/INST]"}) {
    added.push_back({{"id", id++}, {"content", content}, {"special", true}, {"normalized", false}});
  }
  const Json document = {{"added_tokens", added},
                         {"decoder", {{"type", "ByteFallback"}}},
                         {"model",
                          {{"type", "BPE"},
                           {"vocab", vocabulary},
                           {"merges", Json::array()},
                           {"byte_fallback", true}}}};
  auto tokenizer = Tokenizer::parse(document.dump());
  INFO(tokenizer.status().message());
  REQUIRE(tokenizer.ok());
  return *std::move(tokenizer);
}

}  // namespace

TEST_CASE("every golden is rendered as jinja2 renders it") {
  int cases = 0;
  for (const Json& golden : goldens()) {
    const ChatTemplate chat = parsed(golden["config"]);
    for (const Json& c : golden["cases"]) {
      INFO(golden["name"].get<std::string>() << ": " << c["messages"].dump());
      const auto text = chat.render(messages_of(c["messages"]), c["add_generation_prompt"]);
      if (c["text"].is_null()) {  // the template raises
        CHECK(text.status().code() == absl::StatusCode::kInvalidArgument);
      } else {
        REQUIRE(text.ok());
        CHECK(*text == c["text"].get<std::string>());
      }
      ++cases;
    }
  }
  CHECK(cases == 12 * 22);
}

TEST_CASE("markup becomes control tokens, and what people write never does") {
  const auto tokenizer = byte_tokenizer();
  for (const Json& golden : goldens()) {
    const ChatTemplate chat = parsed(golden["config"]);
    for (const Json& c : golden["cases"]) {
      if (c["text"].is_null()) continue;
      INFO(golden["name"].get<std::string>() << ": " << c["messages"].dump());
      const std::vector<ChatMessage> messages = messages_of(c["messages"]);
      const bool prompt = c["add_generation_prompt"];
      const auto ids = chat.encode(*tokenizer, messages, prompt);
      REQUIRE(ids.ok());
      // The text is the golden's, and the number of control tokens is that of the same chat with
      // its contents emptied.
      CHECK(tokenizer->decode(*ids, false) == c["text"].get<std::string>());
      std::vector<ChatMessage> empty = messages;
      for (ChatMessage& message : empty) message.content.clear();
      const auto bare = chat.encode(*tokenizer, empty, prompt);
      REQUIRE(bare.ok());
      const auto controls = [&](const std::vector<std::int32_t>& list) {
        return std::count_if(list.begin(), list.end(),
                             [&](std::int32_t id) { return tokenizer->is_special(id); });
      };
      CHECK(controls(*ids) == controls(*bare));
      CHECK((controls(*bare) > 0 || c["text"] == ""));
    }
  }
}

TEST_CASE("a chat that cannot be formatted is refused") {
  const ChatTemplate chat = parsed(golden("llama3")["config"]);
  const auto code = [&](std::vector<ChatMessage> messages) {
    return chat.render(messages, true).status().code();
  };
  CHECK(code({}) == absl::StatusCode::kInvalidArgument);
  CHECK(code({{"tool", "x"}}) == absl::StatusCode::kInvalidArgument);
  CHECK(code({{"user<|im_end|>", "x"}}) == absl::StatusCode::kInvalidArgument);
  CHECK(code({{"user", "x"}}) == absl::StatusCode::kOk);
}

TEST_CASE("content that is not UTF-8 is repaired before it is trimmed") {
  for (const Json& golden : goldens()) {
    const ChatTemplate chat = parsed(golden["config"]);
    const auto text =
        chat.render(std::vector<ChatMessage>{{"user", "\xF0\x9F ok \xE2\x82"}}, false);
    REQUIRE(text.ok());
    CHECK(text->find("\uFFFD ok \uFFFD") != std::string::npos);
  }
}

TEST_CASE("other templates are refused in a sentence") {
  const std::string chatml = golden("openhermes")["config"]["chat_template"];
  const std::string flag =
      "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";
  REQUIRE(ChatTemplate::parse(config_with(chatml)).ok());
  const std::vector<std::string> others = {
      std::string("{{ messages[0].content }}"),
      std::string(
          "{{ bos_token }}{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"),
      std::string("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"),
      "{{ bos_token }}" + chatml,
      "<|im_start|><|im_end|> without the flag",
      chatml + "{{ '<|im_start|>assistant\\n<think>\\n' }}",
      "<think>" + chatml,
      "{{ '<|im_start|>system\\nIt\\'s me<|im_end|>\\n' }}" + chatml,
      std::string("{{ bos_token }} trim <|start_header_id|><|eot_id|>"),
      std::string(
          "{{ bos_token }} trim <|start_header_id|><|end_header_id|>\n\n<|eot_id|> Date: x"),
      std::string("<start_of_turn>user") + flag};
  for (const std::string& other : others) {
    INFO(other);
    const auto result = ChatTemplate::parse(config_with(other));
    CHECK(result.status().code() == absl::StatusCode::kUnimplemented);
    CHECK(std::string(result.status().message()).find("chat template") != std::string::npos);
  }
}

// Programs that are one of the known ones but for a step, and say another prompt for it.
TEST_CASE("a template that does more than the format it resembles is refused with what it does") {
  struct Case {
    const char* name;
    const char* from;  // in the golden's program
    const char* to;
    const char* why;
  };
  const std::vector<Case> cases = {
      {"smollm2", "", "{% set system_message = 'You are X.' %}", "it sets"},
      {"smollm2", "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
       "' + system_message + '", "it writes"},
      {"smollm2", "{% if loop.first and messages[0]['role'] != 'system' %}", "{% if loop.first %}",
       "it writes"},
      {"openhermes", "", "{{ '<|im_start|>system\nYou are X.<|im_end|>\n' }}", "it writes"},
      {"openhermes", "", "<|im_start|>system\nYou are X.<|im_end|>\n", "it writes"},
      {"openhermes", "message['content']", "message['content'] | trim", "it writes the value of"},
      {"openhermes", "message['content']", "message['content'].strip()", "it writes the value of"},
      {"openhermes", "'<|im_end|>' + '\\n'", "'<|im_end|>'", "it writes"},
      {"openhermes", "assistant\\n", "assistant\\n<think>\\n", "of its own kind"},
      {"openhermes", "in messages", "in messages[1:]", "it loops over"},
      {"openhermes", "{% for", "{% if '/think' in messages[0].content %}{% endif %}{% for",
       "it looks for"},
      {"openhermes", "{{'<|im_start|>'", "{% if message.role == 'user' %}{{'<|im_start|>'",
       "blocks that do not match"},
      {"openhermes", "", "{% macro m() %}{% endmacro %}", "macro"},
      {"llama3", "", "{% set system_message = 'You are X.' %}", "it sets"},
      {"llama3", "{{ content }}", "{{ content.split('</think>')[-1] }}", "it writes the value of"},
      {"llama3", "{% for",
       "{{ '<|start_header_id|>system<|end_header_id|>\n\n' + messages[0].content | trim + "
       "'<|eot_id|>' }}{% for",
       "it writes"},
      {"llama3", "message['content'] | trim", "message['content']", "it sets"},
      {"llama3_2", "{%- set system_message = \"\" %}", "{%- set system_message = \"You are X.\" %}",
       "it sets"},
      {"llama3_2", "{{- \"<|start_header_id|>system",
       "{%- if system_message %}{%- endif %}{{- \"<|start_header_id|>assistant",
       "resembles Llama 3"},
      {"llama3_2", "December 2023", "July 2025", "resembles Llama 3"},
      {"llama3_2", "{%- set messages = messages[1:] %}", "", "only resembles Llama 3"},
      {"qwen2_5", " and not loop.first", "", "only resembles ChatML"},
      {"qwen3", " and not loop.first", "", "only resembles ChatML"},
      {"qwen3", "{%- if loop.index0 > ns.last_query_index %}", "{%- if loop.last %}",
       "of its own kind"},
      {"qwen3", "enable_thinking is defined and enable_thinking is false", "not enable_thinking",
       "it writes"},
      {"mistral_v0_1", "' [/INST]'", "'[/INST]'", "none of their published"},
      {"mistral_v0_3", "|trim", "", "none of their published"},
      {"llama2", "set system_message = false", "set system_message = 'You are X.'",
       "none of their published"},
  };
  for (const Case& c : cases) {
    std::string jinja = golden(c.name)["config"]["chat_template"];
    const std::size_t at = jinja.find(c.from);
    INFO(c.name << ": " << c.from << " -> " << c.to);
    REQUIRE(at != std::string::npos);
    REQUIRE(ChatTemplate::parse(config_with(jinja)).ok());
    jinja.replace(at, std::string(c.from).size(), c.to);
    const absl::Status status = ChatTemplate::parse(config_with(jinja)).status();
    CHECK(status.code() == absl::StatusCode::kUnimplemented);
    INFO(status.message());
    CHECK(std::string(status.message()).find(c.why) != std::string::npos);
  }
}

TEST_CASE("a template's spelling makes no difference") {
  const Json openhermes = golden("openhermes");
  const std::string jinja = openhermes["config"]["chat_template"];
  const std::vector<std::string> same = {
      "{# | trim #}" + jinja,
      "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}"
      "{% endif %}\n" +
          jinja,
      "{%- for message in messages -%}\n  <|im_start|>{{ message.role }}\n{{ message.content "
      "}}<|im_end|>\n{% endfor %}\n  {%- if add_generation_prompt %}\n<|im_start|>assistant\n"
      "{% endif %}\n",
      "{% for m in messages %}{{ \"<|im_start|>\" ~ m[\"role\"] ~ \"\\n\" ~ m.content }}"
      "{{ '<|im_end|>\\n' }}{% endfor %}"
      "{% if add_generation_prompt == true %}{{ '<|im_start|>' + 'assistant\\n' }}{% endif %}"};
  for (const std::string& other : same) {
    INFO(other);
    const auto chat = ChatTemplate::parse(config_with(other));
    INFO(chat.status().message());
    REQUIRE(chat.ok());
    for (const Json& c : openhermes["cases"]) {
      CHECK(*chat->render(messages_of(c["messages"]), c["add_generation_prompt"]) ==
            c["text"].get<std::string>());
    }
  }
}

TEST_CASE("damaged programs are refused") {
  std::vector<std::string> programs = {"{{",
                                       "{%",
                                       "{#",
                                       "{{ '",
                                       "{{ '\\",
                                       "{% if",
                                       "{% if %}",
                                       "{% endif %}",
                                       "{% else %}",
                                       "{% endfor %}",
                                       "{% %}",
                                       "{{}}",
                                       "{% if (((",
                                       "{{ ))) }}",
                                       "{% elif x %}",
                                       "{",
                                       "{{ '\\x41' }}",
                                       "{% for m in messages %}{% else %}{% endfor %}"};
  std::string blocks, brackets = "{% if ", nots = "{% if ";
  for (int i = 0; i < 100000; ++i) {
    blocks += "{% if x %}";
    brackets += "(";
    nots += "not ";
  }
  programs.insert(programs.end(), {blocks, brackets + " %}", nots + " x %}{% endif %}"});
  for (const char* name : {"qwen3", "llama3_2", "mistral_v0_3"}) {
    const std::string whole = golden(name)["config"]["chat_template"];
    for (std::size_t cut = 1; cut + 1 < whole.size(); cut += 7) {
      programs.push_back(whole.substr(0, cut));
    }
  }
  for (const std::string& program : programs) {
    INFO(program.substr(0, 200));
    const auto result = ChatTemplate::parse(config_with(program));
    CHECK(result.status().code() == absl::StatusCode::kUnimplemented);
    CHECK(result.status().message().size() < 400);
  }
}

TEST_CASE("damaged configurations are refused, and a missing template is told apart") {
  const auto code = [](std::string_view json) { return ChatTemplate::parse(json).status().code(); };
  CHECK(code("") == absl::StatusCode::kInvalidArgument);
  CHECK(code("[]") == absl::StatusCode::kInvalidArgument);
  CHECK(code("{\"chat_template\": 3}") == absl::StatusCode::kInvalidArgument);
  CHECK(code("{\"chat_template\": [3]}") == absl::StatusCode::kInvalidArgument);
  CHECK(code("{\"chat_template\": \"x\", \"bos_token\": 3}") == absl::StatusCode::kInvalidArgument);
  CHECK(code(std::string(100000, '[')) == absl::StatusCode::kInvalidArgument);
  CHECK(code("{}") == absl::StatusCode::kFailedPrecondition);
  CHECK(code("{\"chat_template\": null}") == absl::StatusCode::kFailedPrecondition);
  CHECK(code("{\"chat_template\": []}") == absl::StatusCode::kFailedPrecondition);
}

TEST_CASE("the template comes from a list, from a bos_token object, and from the file beside") {
  const Json llama3 = golden("llama3");
  const std::string jinja = llama3["config"]["chat_template"];
  const Json config = {
      {"bos_token", {{"content", "<|begin_of_text|>"}}},
      {"chat_template",
       {{{"name", "tool_use"}, {"template", "?"}}, {{"name", "default"}, {"template", jinja}}}}};
  const auto text = parsed(config).render(std::vector<ChatMessage>{{"user", "Hello"}}, true);
  REQUIRE(text.ok());
  CHECK(*text == llama3["cases"][1]["text"].get<std::string>());

  const auto folder = std::filesystem::temp_directory_path() / "infemeral_chat_template_test";
  std::filesystem::create_directories(folder);
  const auto path = folder / "tokenizer_config.json";
  std::filesystem::remove(folder / "chat_template.jinja");
  std::ofstream(path) << Json{{"bos_token", "<|begin_of_text|>"}}.dump();
  CHECK(ChatTemplate::load(path).status().code() == absl::StatusCode::kFailedPrecondition);
  std::ofstream(folder / "chat_template.jinja") << jinja;
  CHECK(ChatTemplate::load(path).ok());

  // The file beside comes first, as in transformers, whatever the configuration says.
  const auto hello = [&]() -> std::string {
    const auto chat = ChatTemplate::load(path);
    INFO(chat.status().message());
    REQUIRE(chat.ok());
    return *chat->render(std::vector<ChatMessage>{{"user", "Hello"}}, true);
  };
  std::ofstream(path) << golden("openhermes")["config"].dump();
  CHECK(hello().starts_with("<s><|start_header_id|>"));
  std::filesystem::remove(folder / "chat_template.jinja");
  CHECK(hello().starts_with("<|im_start|>user"));
  std::ofstream(folder / "chat_template.jinja") << "{{ messages }}";
  const absl::Status other = ChatTemplate::load(path).status();
  CHECK(other.code() == absl::StatusCode::kUnimplemented);
  CHECK(std::string(other.message()).find("chat_template.jinja") != std::string::npos);

  // One that cannot be read is not one that is missing. A loop is closed even to root.
  std::filesystem::remove(folder / "chat_template.jinja");
  std::filesystem::create_symlink("chat_template.jinja", folder / "chat_template.jinja");
  const absl::Status loop = ChatTemplate::load(path).status();
  CHECK(loop.code() == absl::StatusCode::kDataLoss);
  CHECK(std::string(loop.message()).find("cannot open ") == 0);

  std::filesystem::remove_all(folder);
  CHECK(ChatTemplate::load(path).status().code() == absl::StatusCode::kNotFound);
}

}  // namespace infemeral
