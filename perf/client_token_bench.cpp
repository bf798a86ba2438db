// The whole client work for one decode token, without the network: the time from asking for a
// token's cloaked row to having it, and from a returned row to the next token, on the wall clock.
//
//   client_token_bench [--shape VxH | --model PREPARED --prompts GOLDEN.json]
//                      [--backend cpu|cuda] [--tokens N] [--head MODE]
//
// Makes a client folder of random weights (tied, lazy cloak) in the temporary directory, opens it
// as engine_run does, and plays the body's part with random rows. With --model the weights are
// those of a folder of engine_prep, and the rows those that its body returns while N tokens a
// prompt are drawn (T 0.7, top-p 0.9; GOLDEN.json holds the prompts' ids, as tests/golden): how
// long a draw takes depends on how likely the tokens are. One line of JSON on stdout for each way
// of sampling: times in milliseconds, and what the head had to do. The L2 is as real use leaves it.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "engine/pipeline.h"
#include "engine/report.h"
#include "engine/text.h"
#include "engine/wire.h"
#include "perf/bench_client.h"
#include "perf/row_recorder.h"
#include "tools/backend_select.h"
#include "tools/endpoint.h"

namespace infemeral {
namespace {

using Clock = std::chrono::steady_clock;

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "client_token_bench: %s\n", what.c_str());
  std::exit(1);
}
void check(const absl::Status& status) {
  if (!status.ok()) fail(std::string(status.message()));
}
template <typename T>
T value(absl::StatusOr<T> result) {
  check(result.status());
  return *std::move(result);
}
double ms_since(Clock::time_point begin) {
  return std::chrono::duration<double, std::milli>(Clock::now() - begin).count();
}

using Rows = std::vector<std::vector<std::byte>>;

Rows random_rows(std::size_t hidden) {
  std::mt19937_64 rng{std::random_device{}()};
  std::normal_distribution<float> normal;
  Rows rows(64);
  for (auto& row : rows) {
    std::vector<float> values(hidden);
    for (float& x : values) x = normal(rng);
    row.resize(wire_row_bytes(WireDtype::kF16, hidden));
    encode_wire_row(WireDtype::kF16, values, row.data());
  }
  return rows;
}

// What the body of `prepared` returns while the backend draws n tokens for each prompt.
Rows recorded_rows(ClientBackend& backend, const ClientManifest& manifest,
                   const std::filesystem::path& prepared, const std::string& prompts, int n) {
  std::ifstream file(prompts);
  const auto golden = nlohmann::json::parse(file, nullptr, false);
  if (golden.is_discarded() || !golden.contains("prompts")) fail(cat(prompts, " has no prompts"));
  const Endpoint endpoint = value(Endpoint::open({.body_folder = prepared / "body"}, manifest));
  const std::unique_ptr<Link> link = value(endpoint.connect({}));
  RowRecorder recorder(*link);
  Pipeline pipeline(backend, recorder, {.wire = WireDtype::kF16});
  std::uint64_t seed = 0;
  for (const auto& prompt : golden["prompts"]) {
    const std::vector<std::int32_t> ids = prompt["input_ids"];
    GenerateResult result;
    check(pipeline.generate({.prompt = ids,
                             .max_tokens = static_cast<std::uint32_t>(n),
                             .sampling = {.temperature = 0.7f, .top_p = 0.9f, .seed = seed++}},
                            {}, {}, result));
  }
  return recorder.rows();
}

int run(int argc, char** argv) {
  std::size_t vocab = 128256, hidden = 4096;
  int tokens = 0;
  std::string model, prompts;
  BackendOptions options;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string flag = argv[i], value = argv[i + 1];
    const auto head = parse_head_mode(value);
    if (flag == "--shape" && std::sscanf(value.c_str(), "%zux%zu", &vocab, &hidden) == 2) continue;
    if (flag == "--backend") {
      options.name = value;
    } else if (flag == "--model") {
      model = value;
    } else if (flag == "--prompts") {
      prompts = value;
    } else if (flag == "--tokens" && std::atoi(value.c_str()) > 0) {
      tokens = std::atoi(value.c_str());
    } else if (flag == "--head" && head) {
      options.head = *head;
    } else {
      tokens = -1;
    }
  }
  if (tokens < 0 || argc % 2 == 0 || model.empty() != prompts.empty()) {
    std::fprintf(stderr,
                 "usage: client_token_bench [--shape VxH | --model PREPARED --prompts "
                 "GOLDEN.json]\n"
                 "                          [--backend cpu|cuda] [--tokens N] [--head MODE]\n");
    return 2;
  }
  std::optional<BenchFolder> made;
  if (model.empty()) {
    made.emplace("infemeral-client-token-bench");
    check(make_bench_client(made->path, vocab, hidden, CloakMode::kLazy));
  }
  const auto begin = Clock::now();
  ClientFolder client =
      value(ClientFolder::open(made ? made->path : std::filesystem::path(model) / "client"));
  const ClientManifest manifest = client.manifest;
  const std::unique_ptr<ClientBackend> opened =
      value(open_backend(std::move(client), options, [](LogLevel, std::string_view text) {
        std::fprintf(stderr, "%s\n", std::string(text).c_str());
      }));
  ClientBackend& backend = *opened;
  const double load_ms = ms_since(begin);
  std::fprintf(stderr, "%s: opened in %.0f ms\n", std::string(backend.name()).c_str(), load_ms);
  vocab = backend.vocab_size();
  hidden = backend.hidden_size();
  const Rows rows = made ? random_rows(hidden)
                         : recorded_rows(backend, manifest, model, prompts, tokens ? tokens : 32);
  const std::size_t row_bytes = wire_row_bytes(WireDtype::kF16, hidden);
  const int measured = !made ? static_cast<int>(rows.size()) : tokens ? tokens : 200;
  std::mt19937_64 rng{std::random_device{}()};
  const std::pair<const char*, SamplingParams> ways[] = {
      {"greedy", {}},
      {"top-k 50, top-p 0.9, T 0.7", {.temperature = 0.7f, .top_k = 50, .top_p = 0.9f}},
      {"top-p 0.9, T 0.7", {.temperature = 0.7f, .top_p = 0.9f}},
      {"T 1", {.temperature = 1}}};
  bool first = true;
  for (const auto& [name, params] : ways) {
    std::vector<double> whole, embeds, heads;
    std::vector<std::byte> out(row_bytes);
    std::int32_t token = 0;
    PhaseTimes times;
    constexpr int kWarmUp = 10;
    HeadCounters before;
    for (int i = 0; i < measured + kWarmUp; ++i) {
      if (i == kWarmUp) before = backend.head_counters();
      SampleRequest request{.params = params, .position = static_cast<std::uint64_t>(i)};
      request.params.seed = rng();
      const auto start = Clock::now();
      check(backend.embed({&token, 1}, WireDtype::kF16, out, times));
      const double embed_ms = ms_since(start);
      const auto returned = Clock::now();
      check(backend.next_tokens(rows[static_cast<std::size_t>(i) % rows.size()], WireDtype::kF16,
                                {&request, 1}, {&token, 1}, times));
      const double head_ms = ms_since(returned);
      if (first) {
        std::fprintf(stderr, "first embedding: %.2f ms, first token: %.2f ms\n", embed_ms, head_ms);
      }
      first = false;
      if (i < kWarmUp) continue;
      whole.push_back(embed_ms + head_ms);
      embeds.push_back(embed_ms);
      heads.push_back(head_ms);
    }
    const Summary all = summarize(whole), embed = summarize(embeds), head = summarize(heads);
    const HeadCounters after = backend.head_counters();
    std::printf(
        "{\"shape\":\"%zux%zu\",\"backend\":\"%s\",\"head\":\"%s\",\"sampling\":\"%s\","
        "\"tokens\":%d,\"token_ms_mean\":%.4f,\"token_ms_p50\":%.4f,\"token_ms_p90\":%.4f,\"token_"
        "ms_p99\":%.4f,"
        "\"embed_ms_p50\":%.4f,\"head_ms_p50\":%.4f,\"load_ms\":%.1f,"
        "\"rows_rescored\":%llu,\"full_passes\":%llu}\n",
        vocab, hidden, std::string(backend.name()).c_str(),
        std::string(head_mode_name(options.head)).c_str(), name, measured, all.mean, all.p50,
        all.p90, all.p99, embed.p50, head.p50, load_ms,
        static_cast<unsigned long long>(after.rows_rescored - before.rows_rescored),
        static_cast<unsigned long long>(after.full_passes - before.full_passes));
    std::fflush(stdout);
  }
  return 0;
}

}  // namespace
}  // namespace infemeral

int main(int argc, char** argv) {
  return infemeral::run(argc, argv);
}
