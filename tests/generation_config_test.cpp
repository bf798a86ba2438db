#include "engine/generation_config.h"

#include <catch2/catch.hpp>

namespace infemeral {

TEST_CASE("defaults follow Hugging Face: greedy unless do_sample") {
  const auto greedy = parse_generation_config(
      R"({"bos_token_id": 1, "eos_token_id": 2, "temperature": 0.6, "top_p": 0.9})");
  REQUIRE(greedy.ok());
  CHECK(greedy->end_tokens == std::vector<std::int32_t>{2});
  CHECK(greedy->sampling.greedy());

  const auto sampled = parse_generation_config(
      R"({"eos_token_id": [128001, 128009], "do_sample": true, "temperature": 0.6, "top_p": 0.9})");
  REQUIRE(sampled.ok());
  CHECK(sampled->end_tokens == std::vector<std::int32_t>{128001, 128009});
  CHECK(sampled->sampling.temperature == 0.6f);
  CHECK(sampled->sampling.top_p == 0.9f);
  CHECK(sampled->sampling.top_k == 50);
}

TEST_CASE("a greedy file's filters are there for a caller who sets a temperature") {
  const auto greedy =
      parse_generation_config(R"({"temperature": 0.6, "top_p": 0.9, "min_p": 0.1})");
  REQUIRE(greedy.ok());
  CHECK(greedy->sampling.temperature == 0);
  CHECK(greedy->sampling.top_p == 0.9f);
  CHECK(greedy->sampling.min_p == 0.1f);
  CHECK(greedy->sampling.top_k == 50);

  const auto named = parse_generation_config(R"({"do_sample": false, "top_k": 20})");
  REQUIRE(named.ok());
  CHECK(named->sampling.greedy());
  CHECK(named->sampling.top_k == 20);
}

TEST_CASE("top_k null and -1 are off") {
  for (const char* text : {R"({"do_sample": true, "top_k": null})", R"({"top_k": null})",
                           R"({"do_sample": true, "top_k": -1})", R"({"top_k": -1})",
                           R"({"do_sample": true, "top_k": 0})"}) {
    INFO(text);
    const auto config = parse_generation_config(text);
    REQUIRE(config.ok());
    CHECK(config->sampling.top_k == 0);
  }
}

TEST_CASE("a greedy file is usable whatever its filters say") {
  const auto config = parse_generation_config(
      R"({"do_sample": false, "temperature": -1, "top_k": -7, "top_p": 0, "min_p": 2,
          "repetition_penalty": 1.1})");
  INFO(config.status().message());
  REQUIRE(config.ok());
  CHECK(config->sampling.greedy());
  CHECK(config->sampling.top_k == 0);
  CHECK(config->sampling.top_p == 1);
  CHECK(config->sampling.min_p == 0);
  CHECK(config->sampling.repetition_penalty == 1.1f);
  CHECK(!parse_generation_config(R"({"do_sample": false, "repetition_penalty": -1})").ok());
}

TEST_CASE("damaged generation configurations are refused by field") {
  const auto message = [](const char* text) {
    const auto config = parse_generation_config(text);
    REQUIRE(!config.ok());
    return std::string(config.status().message());
  };
  CHECK(message("[]").find("JSON object") != std::string::npos);
  CHECK(message("{").find("JSON") != std::string::npos);
  CHECK(message(R"({"eos_token_id": -1})").find("eos_token_id") != std::string::npos);
  CHECK(message(R"({"eos_token_id": [1, "x"]})").find("eos_token_id") != std::string::npos);
  CHECK(message(R"({"eos_token_id": 4294967296})").find("eos_token_id") != std::string::npos);
  CHECK(message(R"({"do_sample": true, "top_p": "a"})").find("top_p") != std::string::npos);
  CHECK(message(R"({"do_sample": true, "top_k": 1e12})").find("top_k") != std::string::npos);
  CHECK(message(R"({"do_sample": true, "temperature": -1})").find("temperature") !=
        std::string::npos);
}

TEST_CASE("a folder without the file has plain defaults") {
  const auto config = load_generation_config("/nonexistent");
  REQUIRE(config.ok());
  CHECK(config->end_tokens.empty());
  CHECK(config->sampling.greedy());
  CHECK(config->sampling.top_k == 50);
}

}  // namespace infemeral
