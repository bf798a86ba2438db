// The CPU body on random weights in the shape of SmolLM2-135M: decode and prefill, by context and
// by the number of sessions that share a pass over the weights, with float16 and int8 weights.
//
//   GB/s   weight bytes over time: the lower bound of a decode step is their reading
//   rows/s tokens, prefilled or decoded
#include <benchmark/benchmark.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <random>
#include <vector>

#include "cpu/body.h"
#include "cpu/prepare.h"
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

constexpr double kWeights = 30.0 * 576 * (2 * 576 + 2 * 192 + 3 * 1536);

void check(const absl::Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s\n", std::string(status.message()).c_str());
  std::exit(2);
}

std::unique_ptr<Body> load(bool int8) {
  const TempFolder folder;  // the mapping outlives the file
  std::filesystem::path path = folder.path() / "model";
  make_tiny_model(path, kShape);
  if (int8) {
    check(
        prepare_model(
            {.model_dir = path, .output_dir = folder.path() / "prepared", .body_dtype = Dtype::kI8})
            .status());
    path = folder.path() / "prepared" / "body";
  }
  auto result = load_cpu_body(path, {});
  check(result.status());
  return *std::move(result);
}

Body& body(bool int8) {
  static std::unique_ptr<Body> loaded[2];
  if (loaded[int8] == nullptr) loaded[int8] = load(int8);
  return *loaded[int8];
}

std::vector<float> random_states(std::size_t rows) {
  std::minstd_rand rng(1);
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::vector<float> x(rows * kShape.hidden);
  for (float& v : x) v = uniform(rng);
  return x;
}

void report(benchmark::State& state, double rows, bool int8) {
  using benchmark::Counter;
  state.counters["rows/s"] = Counter(rows, Counter::kIsIterationInvariantRate);
  state.counters["GB/s"] =
      Counter(kWeights * (int8 ? 1 : 2) * 1e-9, Counter::kIsIterationInvariantRate);
}

void prefill(Body& body, BodySession& session, std::uint32_t rows) {
  const std::vector<float> states = random_states(rows);
  BodyStep step{.session = &session, .rows = rows, .states = states, .wanted = Wanted::kNone};
  body.run({&step, 1});
}

// args: positions in the cache, sessions, whether the weights are int8.
void Decode(benchmark::State& state) {
  const auto context = static_cast<std::uint32_t>(state.range(0));
  const auto count = static_cast<std::size_t>(state.range(1));
  const bool int8 = state.range(2) != 0;
  Body& body = infemeral::body(int8);
  const std::vector<float> states = random_states(1);
  std::vector<std::unique_ptr<BodySession>> sessions;
  std::vector<std::vector<float>> outs(count, std::vector<float>(kShape.hidden));
  std::vector<BodyStep> steps;
  for (std::size_t i = 0; i < count; ++i) {
    sessions.push_back(body.new_session().value());
    prefill(body, *sessions.back(), context);
    steps.push_back({.session = sessions.back().get(),
                     .start_pos = context,
                     .rows = 1,
                     .states = states,
                     .out = outs[i]});
  }
  for (auto _ : state) body.run(steps);
  report(state, static_cast<double>(count), int8);
}
BENCHMARK(Decode)
    ->ArgNames({"context", "sessions", "i8"})
    ->Args({16, 1, 0})
    ->Args({1024, 1, 0})
    ->Args({4096, 1, 0})
    ->Args({16, 2, 0})
    ->Args({16, 4, 0})
    ->Args({16, 8, 0})
    ->Args({1024, 8, 0})
    ->Args({16, 1, 1})
    ->Args({16, 8, 1})
    ->UseRealTime()
    ->Unit(benchmark::kMillisecond);

void Prefill(benchmark::State& state) {
  const auto rows = static_cast<std::uint32_t>(state.range(0));
  const bool int8 = state.range(1) != 0;
  Body& body = infemeral::body(int8);
  const auto session = body.new_session().value();
  for (auto _ : state) prefill(body, *session, rows);
  report(state, rows, int8);
}
BENCHMARK(Prefill)
    ->ArgNames({"rows", "i8"})
    ->Args({64, 0})
    ->Args({512, 0})
    ->Args({2048, 0})
    ->Args({512, 1})
    ->UseRealTime()
    ->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace infemeral

BENCHMARK_MAIN();
