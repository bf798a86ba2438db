// Private generation on the real model against Hugging Face's tokens: rotated body in f32, wire
// f32, through the encrypted channel. Needs the demo model prepared in f32 (tools/check.sh does
// it); the folder is given by INFEMERAL_DEMO_F32.
#include <catch2/catch.hpp>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>

#include "engine/pipeline.h"
#include "tests/private_stack.h"

namespace infemeral {
namespace {

using Json = nlohmann::json;

Json load_golden() {
  std::ifstream file(INFEMERAL_SOURCE_DIR "/tests/golden/smollm2_greedy.json");
  return Json::parse(file);
}

}  // namespace

TEST_CASE("private generation gives the reference's tokens on the demo model") {
  const char* folder = std::getenv("INFEMERAL_DEMO_F32");
  if (folder == nullptr) {
    std::cout << "skipped: INFEMERAL_DEMO_F32 does not name the prepared demo model\n";
    return;
  }
  PrivateStack stack(folder);
  Pipeline pipeline(*stack.backend, *stack.link, {.wire = WireDtype::kF32});

  const Json golden = load_golden();
  const std::size_t n_tokens = golden["n_tokens"];
  std::size_t compared = 0, equal_prompts = 0;
  REQUIRE(golden["prompts"].size() >= 32);
  for (const Json& prompt : golden["prompts"]) {
    const std::vector<std::int32_t> expected = prompt["output_ids"];
    REQUIRE(expected.size() == n_tokens);
    GenerateResult result;
    const auto status = pipeline.generate(
        {.prompt = prompt["input_ids"], .max_tokens = static_cast<std::uint32_t>(n_tokens)}, {}, {},
        result);
    INFO(status.ToString());
    REQUIRE(status.ok());
    REQUIRE(result.tokens.size() == n_tokens);
    const auto [mine, theirs] =
        std::mismatch(result.tokens.begin(), result.tokens.end(), expected.begin());
    const auto position = static_cast<std::size_t>(mine - result.tokens.begin());
    compared += position;
    if (position == n_tokens) {
      ++equal_prompts;
      continue;
    }
    // After a near-tie the texts may differ for good: the comparison of this prompt ends there.
    const double gap = prompt["gaps"][position];
    std::cout << "near-tie: " << prompt["id"] << " token " << position << ": " << *mine
              << " for the reference's " << *theirs << ", gap " << gap << "\n";
    CAPTURE(prompt["id"], position, gap);
    CHECK(gap < 1e-3);
    CHECK(*mine == prompt["second_ids"][position].get<std::int32_t>());
  }
  std::cout << equal_prompts << " of " << golden["prompts"].size() << " prompts equal in all "
            << n_tokens << " tokens; " << compared << " tokens compared equal\n";
}

TEST_CASE("the phases explain at least 80 % of every token's time on the demo model") {
  const char* folder = std::getenv("INFEMERAL_DEMO_F32");
  if (folder == nullptr) {
    std::cout << "skipped: INFEMERAL_DEMO_F32 does not name the prepared demo model\n";
    return;
  }
  PrivateStack stack(folder);
  Pipeline pipeline(*stack.backend, *stack.link, {});
  GenerateResult result;
  REQUIRE(pipeline.generate({.prompt = {504, 3575, 282}, .max_tokens = 16}, {}, {}, result).ok());
  for (const TokenTiming& timing : result.timings) {
    CHECK(timing.phases.sum() >= 0.8 * timing.total_ms);
    CHECK(timing.phases.sum() <= 1.02 * timing.total_ms);
    CHECK(timing.phases.body_ms > 0);
    CHECK(timing.phases.de_embed_ms > 0);
  }
}

}  // namespace infemeral
