// What the timing record of a token costs. It is always made: there is no switch, since a switch
// would cost as much as what it switches. So the question is what a token takes when all of its
// timing is done once more. Of every three tokens of a generation,
//
//   once, once again   are the product as it is: what two equal tokens differ by here
//   twice              has as many clock readings on top as it has of its own
//
//   timing_cost MODEL [GENERATIONS [TOKENS]]
//
// MODEL is a folder of engine_prep. One JSON object on stdout; the bar is 2 % of a token.
#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <vector>

#include "engine/environment.h"
#include "engine/report.h"
#include "engine/text.h"
#include "engine/version.h"
#include "perf/bench_cases.h"
#include "tools/backend_select.h"
#include "tools/cli.h"
#include "tools/endpoint.h"

namespace infemeral {
namespace {

// A decoded token is closed by about 30 readings, the body's two included.
constexpr int kReadings = 40;

void check(const absl::Status& status) {
  if (!status.ok()) throw std::runtime_error(std::string(status.message()));
}
template <typename T>
T value(absl::StatusOr<T> result) {
  check(result.status());
  return *std::move(result);
}

// Passes on, and can read the clock once more as often as a whole token does.
class TimedTwice final : public ClientBackend {
 public:
  explicit TimedTwice(ClientBackend& inner) : inner_(inner) {}
  std::function<bool()> twice;  // the token that is chosen next

  std::string_view name() const override { return inner_.name(); }
  std::size_t hidden_size() const override { return inner_.hidden_size(); }
  std::size_t vocab_size() const override { return inner_.vocab_size(); }
  MemoryUse memory() const override { return inner_.memory(); }
  absl::Status embed(std::span<const std::int32_t> ids, WireDtype dtype, std::span<std::byte> out,
                     PhaseTimes& times) override {
    return inner_.embed(ids, dtype, out, times);
  }
  absl::Status next_tokens(std::span<const std::byte> rows, WireDtype dtype,
                           std::span<const SampleRequest> requests, std::span<std::int32_t> tokens,
                           PhaseTimes& times) override {
    if (twice()) {
      PhaseClock clock;
      for (int i = 1; i < kReadings; ++i) clock.lap(again_.*kPhases[i % kPhases.size()].value);
      record_.push_back({again_, again_.sum()});
    }
    return inner_.next_tokens(rows, dtype, requests, tokens, times);
  }
  absl::Status logits(std::span<const std::byte> row, WireDtype dtype,
                      std::span<float> out) override {
    return inner_.logits(row, dtype, out);
  }

 private:
  ClientBackend& inner_;
  PhaseTimes again_;
  std::vector<TokenTiming> record_;
};

double reading_ns() {
  constexpr int kLaps = 1000;
  std::vector<double> ns;
  for (int i = 0; i < 200; ++i) {
    double spent = 0;
    const auto begin = std::chrono::steady_clock::now();
    PhaseClock clock;
    for (int lap = 0; lap < kLaps; ++lap) clock.lap(spent);
    const std::chrono::duration<double, std::nano> took = std::chrono::steady_clock::now() - begin;
    ns.push_back(took.count() / kLaps);
  }
  return summarize(ns).p50;
}

nlohmann::json summary(const std::vector<double>& ratios) {
  const Summary s = summarize(ratios);
  const std::size_t quarter = ratios.size() / 4;
  std::vector<double> sorted = ratios;
  std::sort(sorted.begin(), sorted.end());
  return {{"median", s.median},
          {"quarter", sorted[quarter]},
          {"three_quarters", sorted[sorted.size() - 1 - quarter]}};
}

int run(const std::string& model, int generations, std::uint32_t tokens) {
  const auto folder = client_folder(model);
  auto opened = value(ClientFolder::open(folder));
  const ClientManifest manifest = opened.manifest;
  const auto backend = value(open_backend(std::move(opened), {.name = "cpu"}, {}));
  const Endpoint endpoint = value(Endpoint::open({.body_folder = body_folder(folder)}, manifest));
  const auto link = value(endpoint.connect({}));
  const BenchPlan plan{.max_tokens = tokens, .max_context = manifest.max_context};
  TimedTwice timed(*backend);
  std::vector<std::int32_t> prompt(16);
  for (std::size_t i = 0; i < prompt.size(); ++i) {
    prompt[i] = static_cast<std::int32_t>((i * 7919 + 17) % manifest.vocab_size);
  }
  // Which of its three a token is; no arm is always the first of them.
  const auto arm_of = [](std::size_t token) { return (token + token / 3) % 3; };
  std::vector<double> once, same, twice;
  for (int generation = 0; generation <= generations; ++generation) {
    std::size_t token = 0;
    timed.twice = [&] { return arm_of(token++) == 2; };
    GenerateResult result;
    check(generate_fresh(timed, *link, plan, prompt, tokens, result));
    if (generation == 0) continue;                     // warm
    for (std::size_t i = 3; i + 2 < tokens; i += 3) {  // the first token is a prompt's
      std::array<double, 3> ms{};
      for (std::size_t k = i; k < i + 3; ++k) ms[arm_of(k)] = result.timings[k].total_ms;
      once.push_back(ms[0]);
      same.push_back(ms[1] / ms[0]);
      twice.push_back(2 * ms[2] / (ms[0] + ms[1]));
    }
  }
  const double ns = reading_ns(), token_ms = summarize(once).p50;
  const Environment environment = read_environment();
  const nlohmann::json json = {{"program", "timing_cost"},
                               {"git_revision", std::string(kGitRevision)},
                               {"cpu", environment.cpu},
                               {"logical_cores", environment.logical_cores},
                               {"tokens", once.size() * 3},
                               {"token_ms_p50", token_ms},
                               {"clock_reading_ns", ns},
                               {"readings_per_token", kReadings},
                               {"share_of_token", 1e-6 * ns * kReadings / token_ms},
                               {"once_again_over_once", summary(same)},
                               {"twice_over_once", summary(twice)}};
  std::printf("%s\n", json.dump(2).c_str());
  return 0;
}

}  // namespace
}  // namespace infemeral

int main(int argc, char** argv) {
  const int generations = argc > 2 ? std::atoi(argv[2]) : 20;
  const int tokens = argc > 3 ? std::atoi(argv[3]) : 129;
  if (argc < 2 || argc > 4 || generations < 1 || tokens < 12) {
    std::fprintf(stderr, "usage: timing_cost MODEL [GENERATIONS [TOKENS]]\n");
    return 2;
  }
  try {
    return infemeral::run(argv[1], generations, static_cast<std::uint32_t>(tokens));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "timing_cost: %s\n", error.what());
    return 1;
  }
}
