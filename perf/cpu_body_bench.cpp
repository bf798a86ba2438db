// The CPU body on random weights in the shape of SmolLM2-135M: decode and prefill, by context and
// by the number of sessions that share a pass over the weights.
//
//   GB/s   weight bytes over time: the lower bound of a decode step is their reading
//   rows/s tokens, prefilled or decoded
#include <benchmark/benchmark.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "cpu/body.h"
#include "tests/tiny_model.h"

namespace infemeral {
namespace {

const TinyModelOptions kShape = {.hidden = 576,
                                 .layers = 30,
                                 .heads = 9,
                                 .kv_heads = 3,
                                 .head_dim = 64,
                                 .intermediate = 1536,
                                 .vocab = 16,
                                 .max_context = 8192,
                                 .tied = true,
                                 .dtype = Dtype::kF16};

constexpr double kWeightBytes = 30.0 * 2 * 576 * (2 * 576 + 2 * 192 + 3 * 1536);

Body& body() {
  static const std::unique_ptr<Body> loaded = [] {
    const TempFolder folder;  // the mapping outlives the file
    make_tiny_model(folder.path() / "model", kShape);
    auto result = load_cpu_body(folder.path() / "model", {});
    if (!result.ok()) {
      std::fprintf(stderr, "%s\n", std::string(result.status().message()).c_str());
      std::exit(2);
    }
    return *std::move(result);
  }();
  return *loaded;
}

std::vector<float> random_states(std::size_t rows) {
  std::minstd_rand rng(1);
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::vector<float> x(rows * kShape.hidden);
  for (float& v : x) v = uniform(rng);
  return x;
}

void report(benchmark::State& state, double rows) {
  using benchmark::Counter;
  state.counters["rows/s"] = Counter(rows, Counter::kIsIterationInvariantRate);
  state.counters["GB/s"] = Counter(kWeightBytes * 1e-9, Counter::kIsIterationInvariantRate);
}

void prefill(BodySession& session, std::uint32_t rows) {
  const std::vector<float> states = random_states(rows);
  BodyStep step{.session = &session, .rows = rows, .states = states, .wanted = Wanted::kNone};
  body().run({&step, 1});
}

// args: positions in the cache, sessions.
void Decode(benchmark::State& state) {
  const auto context = static_cast<std::uint32_t>(state.range(0));
  const auto count = static_cast<std::size_t>(state.range(1));
  const std::vector<float> states = random_states(1);
  std::vector<std::unique_ptr<BodySession>> sessions;
  std::vector<std::vector<float>> outs(count, std::vector<float>(kShape.hidden));
  std::vector<BodyStep> steps;
  for (std::size_t i = 0; i < count; ++i) {
    sessions.push_back(body().new_session().value());
    prefill(*sessions.back(), context);
    steps.push_back({.session = sessions.back().get(),
                     .start_pos = context,
                     .rows = 1,
                     .states = states,
                     .out = outs[i]});
  }
  for (auto _ : state) body().run(steps);
  report(state, static_cast<double>(count));
}
BENCHMARK(Decode)
    ->ArgNames({"context", "sessions"})
    ->Args({16, 1})
    ->Args({1024, 1})
    ->Args({4096, 1})
    ->Args({16, 2})
    ->Args({16, 4})
    ->Args({16, 8})
    ->Args({1024, 8})
    ->UseRealTime()
    ->Unit(benchmark::kMillisecond);

void Prefill(benchmark::State& state) {
  const auto rows = static_cast<std::uint32_t>(state.range(0));
  const auto session = body().new_session().value();
  for (auto _ : state) prefill(*session, rows);
  report(state, rows);
}
BENCHMARK(Prefill)->ArgName("rows")->Arg(64)->Arg(512)->Arg(2048)->UseRealTime()->Unit(
    benchmark::kMillisecond);

}  // namespace
}  // namespace infemeral

BENCHMARK_MAIN();
