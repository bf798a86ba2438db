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
}

}  // namespace infemeral
