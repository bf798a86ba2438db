// The whole client work for one decode token, without the network: the time from asking for a
// token's cloaked row to having it, and from a returned row to the next token, on the wall clock.
//
//   client_token_bench [--shape VxH] [--backend cpu|cuda] [--tokens N] [--head MODE]
//
// Makes a client folder of random weights (tied, lazy cloak) in the temporary directory, opens it
// as engine_run does, and plays the body's part with random rows. One line of JSON on stdout for
// each way of sampling: medians and percentiles in milliseconds. The L2 is as real use leaves it.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "engine/report.h"
#include "engine/wire.h"
#include "perf/bench_client.h"
#include "tools/backend_select.h"

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
double ms_since(Clock::time_point begin) {
  return std::chrono::duration<double, std::milli>(Clock::now() - begin).count();
}

int run(int argc, char** argv) {
  std::size_t vocab = 128256, hidden = 4096;
  int tokens = 200;
  BackendOptions options;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string flag = argv[i], value = argv[i + 1];
    const auto head = parse_head_mode(value);
    if (flag == "--shape" && std::sscanf(value.c_str(), "%zux%zu", &vocab, &hidden) == 2) continue;
    if (flag == "--backend") {
      options.name = value;
    } else if (flag == "--tokens" && std::atoi(value.c_str()) > 0) {
      tokens = std::atoi(value.c_str());
    } else if (flag == "--head" && head) {
      options.head = *head;
    } else {
      std::fprintf(stderr,
                   "usage: client_token_bench [--shape VxH] [--backend cpu|cuda] [--tokens N]\n"
                   "                          [--head MODE]\n");
      return 2;
    }
  }
  const BenchFolder folder("infemeral-client-token-bench");
  check(make_bench_client(folder.path, vocab, hidden, CloakMode::kLazy));
  const auto begin = Clock::now();
  auto client = ClientFolder::open(folder.path);
  if (!client.ok()) fail(std::string(client.status().message()));
  auto opened = open_backend(*std::move(client), options, [](LogLevel, std::string_view text) {
    std::fprintf(stderr, "%s\n", std::string(text).c_str());
  });
  if (!opened.ok()) fail(std::string(opened.status().message()));
  ClientBackend& backend = **opened;
  const double load_ms = ms_since(begin);
  std::fprintf(stderr, "%s: opened in %.0f ms\n", std::string(backend.name()).c_str(), load_ms);

  std::mt19937_64 rng{std::random_device{}()};
  std::normal_distribution<float> normal;
  const std::size_t row_bytes = wire_row_bytes(WireDtype::kF16, hidden);
  std::vector<std::vector<std::byte>> rows(64);
  for (auto& row : rows) {
    std::vector<float> values(hidden);
    for (float& x : values) x = normal(rng);
    row.resize(row_bytes);
    encode_wire_row(WireDtype::kF16, values, row.data());
  }
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
    for (int i = 0; i < tokens + kWarmUp; ++i) {
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
    std::printf(
        "{\"shape\":\"%zux%zu\",\"backend\":\"%s\",\"head\":\"%s\",\"sampling\":\"%s\","
        "\"tokens\":%d,\"token_ms_p50\":%.4f,\"token_ms_p90\":%.4f,\"token_ms_p99\":%.4f,"
        "\"embed_ms_p50\":%.4f,\"head_ms_p50\":%.4f,\"load_ms\":%.1f}\n",
        vocab, hidden, std::string(backend.name()).c_str(),
        std::string(head_mode_name(options.head)).c_str(), name, tokens, all.p50, all.p90, all.p99,
        embed.p50, head.p50, load_ms);
    std::fflush(stdout);
  }
  return 0;
}

}  // namespace
}  // namespace infemeral

int main(int argc, char** argv) {
  return infemeral::run(argc, argv);
}
