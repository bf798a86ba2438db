// The client's work for one decode token on the CPU against the limits of the machine, at the size
// of a large vocabulary: the certified head against reading the float16 matrix once, the float16
// product against the memory's speed, and sampling by itself.
//
//   cpu_client_bench [-t THREADS] [--shape VxH] [--rounds N] [--folder DIR] [--on-request]
//                    [--folded]
//
// --folded also measures tokens from folded tables (engine_prep --fold-cloak), beside the others.
//
// In every round each thing is measured once, one after the other, so that a noisy machine disturbs
// all of them alike; and in another order, since a token finds less of its weights in the
// last-level cache after a read of the float16 matrix than after another token. stdout: one line of
// JSON with the minimum and the median of every time, in milliseconds, and ratios. With
// --on-request a round begins when a line arrives on stdin, and ends with a line of JSON with its
// times: so perf/cpu_peers.py measures its own in between. --folder keeps the weights (1 GB, with
// --folded 3) for the next time. INFEMERAL_ISA forces an instruction-set path.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <iostream>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/client_backend.h"
#include "cpu/linear.h"
#include "cpu/parallel.h"
#include "cpu/simd/dispatch.h"
#include "engine/report.h"
#include "engine/wire.h"
#include "perf/bench_client.h"

namespace infemeral {
namespace {

using Clock = std::chrono::steady_clock;
using Json = nlohmann::ordered_json;

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "cpu_client_bench: %s\n", what.c_str());
  std::exit(1);
}
void check(const absl::Status& status) {
  if (!status.ok()) fail(std::string(status.message()));
}
template <typename T>
T value_of(absl::StatusOr<T> result) {
  check(result.status());
  return *std::move(result);
}
double ms_since(Clock::time_point begin) {
  return std::chrono::duration<double, std::milli>(Clock::now() - begin).count();
}

struct Options {
  int threads = 0;
  std::size_t vocab = 128256, hidden = 4096;
  int rounds = 30;
  std::string folder;
  bool on_request = false;
  bool folded = false;
};

std::optional<Options> parse(int argc, char** argv) {
  Options o;
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i];
    if (flag == "--on-request") {
      o.on_request = true;
      continue;
    }
    if (flag == "--folded") {
      o.folded = true;
      continue;
    }
    if (i + 1 == argc) return std::nullopt;
    const char* value = argv[++i];
    if (flag == "-t") {
      o.threads = std::atoi(value);
    } else if (flag == "--rounds") {
      o.rounds = std::atoi(value);
    } else if (flag == "--folder") {
      o.folder = value;
    } else if (flag != "--shape" || std::sscanf(value, "%zux%zu", &o.vocab, &o.hidden) != 2) {
      return std::nullopt;
    }
  }
  const bool sane = o.threads >= 0 && o.rounds > 0 && o.vocab >= 1000 && o.hidden > 0;
  return sane ? std::optional(o) : std::nullopt;
}

std::string cpu_model() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    if (line.starts_with("model name")) return line.substr(line.find(':') + 2);
  }
  return "unknown";
}

// Adds up memory, every thread a contiguous part at a time; ahead: fetches so many bytes before.
void read_memory(ThreadPool& pool, const Matrix& matrix, std::size_t ahead) {
  const auto* words = reinterpret_cast<const std::uint64_t*>(matrix.data);
  const std::size_t n = matrix.rows * matrix.row_bytes() / sizeof(std::uint64_t);
  pool.for_ranges(n, 1 << 16, 64, [&](const Range& range) {
    std::uint64_t sums[8] = {};
    for (std::size_t i = range.begin; i + 8 <= range.end; i += 8) {
      if (ahead > 0) __builtin_prefetch(words + i + ahead / sizeof(std::uint64_t));
      for (std::size_t j = 0; j < 8; ++j) sums[j] += words[i + j];
    }
    for (std::uint64_t& sum : sums) asm volatile("" : : "r"(sum));
  });
}

// States whose logits look like a language model's: a wide bulk, and some tokens far above it whose
// logits fall with the logarithm of their rank, fast (a sure next word) or slowly (many words fit).
std::vector<float> draw_state(const Matrix& lm_head, std::mt19937_64& rng) {
  constexpr float kBulk = 2, kTop = 18;
  constexpr std::size_t kLikely = 200;
  const float steepness[] = {6, 3, 2, 1.5f};
  std::normal_distribution<float> normal(0, kBulk / std::sqrt(static_cast<float>(lm_head.cols)));
  std::vector<float> state(lm_head.cols);
  for (float& y : state) y = normal(rng);
  const float fall = steepness[rng() % 4];
  for (std::size_t rank = 0; rank < kLikely; ++rank) {
    const float logit = kTop - fall * std::log(static_cast<float>(rank + 1));
    if (logit <= 0) break;
    const auto* row =
        reinterpret_cast<const std::uint16_t*>(lm_head.row(rng() % lm_head.rows).data);
    for (std::size_t j = 0; j < state.size(); ++j) {
      state[j] += logit / static_cast<float>(lm_head.cols) * f16_to_f32(row[j]);
    }
  }
  return state;
}

// What the body would return for it: the state times Q, in the wire format f16.
std::vector<std::byte> cloaked(const std::vector<float>& state, const Cloak& cloak) {
  const std::size_t h = state.size();
  std::vector<float> row(h, 0);
  for (std::size_t i = 0; i < h; ++i) {
    for (std::size_t j = 0; j < h; ++j) row[j] += state[i] * f16_to_f32(cloak.values()[i * h + j]);
  }
  std::vector<std::byte> bytes(wire_row_bytes(WireDtype::kF16, h));
  encode_wire_row(WireDtype::kF16, row, bytes.data());
  return bytes;
}

class Bench {
 public:
  Bench(const std::filesystem::path& path, const Options& options)
      : options_(options), kernels_(*value_of(simd::choose_kernels())), pool_(options.threads) {
    folder_.emplace(value_of(ClientFolder::open(path)));
    lm_head_ = {simd::Format::kF16, folder_->lm_head.data.data(), options.vocab, options.hidden};
    // Once unmeasured: the mapped file is in the page cache after it.
    read_memory(pool_, lm_head_, 0);
    const Cloak cloak = value_of(folder_->load_cloak());
    for (int i = 0; i < 16; ++i) rows_.push_back(cloaked(draw_state(lm_head_, rng_), cloak));
    start_ms_ = open(path, HeadMode::kCertified, certified_);
    open(path, HeadMode::kFull, full_);
    if (options.folded) {
      open(path / "folded", HeadMode::kCertified, folded_);
      const ClientFolder tables = value_of(ClientFolder::open(path / "folded"));
      const Matrix head{simd::Format::kF16, tables.lm_head.data.data(), options.vocab,
                        options.hidden};
      read_memory(pool_, head, 0);
      for (int i = 0; i < 16; ++i) {
        folded_rows_.emplace_back(wire_row_bytes(WireDtype::kF16, options.hidden));
        encode_wire_row(WireDtype::kF16, draw_state(head, rng_), folded_rows_.back().data());
      }
    }
    logits_.resize(options.vocab);
    certified_->logits(rows_[0], WireDtype::kF16, logits_).IgnoreError();
  }

  const simd::Kernels& kernels() const { return kernels_; }
  int threads() const { return pool_.threads(); }
  double start_ms() const { return start_ms_; }
  const HeadCounters& counters(const std::string& name) { return counted_[name]; }

  // One measurement of everything, by name.
  std::map<std::string, double> round() {
    std::map<std::string, double> ms;
    const std::vector<std::byte>& row = rows_[rng_() % rows_.size()];
    const auto timed = [&](const char* name, const auto& work) {
      const auto begin = Clock::now();
      work();
      ms[name] = ms_since(begin);
    };
    std::vector<float> x(options_.hidden, 0.01f), scratch = logits_;
    const Linear product{.weight = &lm_head_, .out = {scratch.data(), options_.vocab}};
    const SamplingParams nucleus{.temperature = 0.7f, .top_p = 0.9f};
    const SamplingParams top_k{.temperature = 0.7f, .top_k = 50, .top_p = 0.9f};
    const SamplingParams gumbel{.temperature = 1};
    const auto sample = [&](const char* name, const SamplingParams& params) {
      scratch = logits_;
      SampleRequest request{.params = params, .position = rng_() % 1000};
      request.params.seed = rng_();
      timed(name, [&] { sampler_.sample(scratch, request); });
    };
    std::vector<std::function<void()>> things = {
        [&] { timed("read_plain", [&] { read_memory(pool_, lm_head_, 0); }); },
        [&] { timed("read_ahead", [&] { read_memory(pool_, lm_head_, 4096); }); },
        [&] {
          timed("f16_product", [&] {
            linear(kernels_, pool_, {&product, 1}, {x.data(), options_.hidden}, 1);
          });
        },
        [&] { token(ms, "certified greedy", *certified_, row, {}); },
        [&] { token(ms, "certified top-p", *certified_, row, nucleus); },
        [&] { token(ms, "certified top-k top-p", *certified_, row, top_k); },
        [&] { token(ms, "certified T 1", *certified_, row, gumbel); },
        [&] { token(ms, "full greedy", *full_, row, {}); },
        [&] { token(ms, "full top-p", *full_, row, nucleus); },
        [&] { sample("sample greedy", {}); },
        [&] { sample("sample top-k top-p", top_k); },
        [&] { sample("sample top-p", nucleus); },
        [&] { sample("sample T 1", gumbel); }};
    if (folded_ != nullptr) {
      things.emplace_back([&] {
        token(ms, "certified greedy, folded", *folded_, folded_rows_[rng_() % folded_rows_.size()],
              {});
      });
    }
    std::shuffle(things.begin(), things.end(), rng_);
    for (const auto& thing : things) thing();
    return ms;
  }

 private:
  double open(const std::filesystem::path& path, HeadMode head,
              std::unique_ptr<ClientBackend>& backend) {
    const auto begin = Clock::now();
    ClientFolder folder = value_of(ClientFolder::open(path));
    backend = value_of(
        make_cpu_client_backend(std::move(folder), {.threads = options_.threads, .head = head}));
    // The first embedding loads the cloak.
    std::vector<std::byte> out(wire_row_bytes(WireDtype::kF16, options_.hidden));
    PhaseTimes times;
    const std::int32_t id = 0;
    check(backend->embed({&id, 1}, WireDtype::kF16, out, times));
    return ms_since(begin);
  }

  // A decode token, without body and network: its own row, and the next token from a returned one.
  void token(std::map<std::string, double>& ms, const std::string& name, ClientBackend& backend,
             const std::vector<std::byte>& row, const SamplingParams& params) {
    SampleRequest request{.params = params, .position = rng_() % 1000};
    request.params.seed = rng_();
    std::vector<std::byte> out(row.size());
    auto id = static_cast<std::int32_t>(rng_() % options_.vocab);
    PhaseTimes times;
    const HeadCounters before = backend.head_counters();
    const auto begin = Clock::now();
    check(backend.embed({&id, 1}, WireDtype::kF16, out, times));
    check(backend.next_tokens(row, WireDtype::kF16, {&request, 1}, {&id, 1}, times));
    ms[name] = ms_since(begin);
    ms[name + ", head"] = times.de_embed_ms + times.sample_ms;
    const HeadCounters after = backend.head_counters();
    HeadCounters& sum = counted_[name];
    sum.tokens += after.tokens - before.tokens;
    sum.rows_rescored += after.rows_rescored - before.rows_rescored;
    sum.widenings += after.widenings - before.widenings;
    sum.full_passes += after.full_passes - before.full_passes;
  }

  const Options options_;
  const simd::Kernels& kernels_;
  ThreadPool pool_;
  std::mt19937_64 rng_{std::random_device{}()};
  std::optional<ClientFolder> folder_;
  Matrix lm_head_;
  std::vector<std::vector<std::byte>> rows_;
  std::vector<std::vector<std::byte>> folded_rows_;
  std::unique_ptr<ClientBackend> certified_, full_, folded_;  // folded_: null without --folded
  double start_ms_ = 0;
  std::vector<float> logits_;
  Sampler sampler_;
  std::map<std::string, HeadCounters> counted_;
};

struct Times {
  double min = 0, median = 0;
};

Json summary(Bench& bench, const Options& options,
             const std::map<std::string, std::vector<double>>& samples) {
  Json j;
  j["program"] = "cpu_client_bench";
  j["cpu"] = cpu_model();
  j["hardware_threads"] = std::thread::hardware_concurrency();
  j["threads"] = bench.threads();
  j["isa"] = bench.kernels().name;
  j["shape"] = std::to_string(options.vocab) + "x" + std::to_string(options.hidden);
  j["rounds"] = samples.begin()->second.size();
  j["start_ms"] = bench.start_ms();
  std::map<std::string, Times> of;
  for (const auto& [name, ms] : samples) {
    of[name] = {*std::min_element(ms.begin(), ms.end()), summarize(ms).median};
  }
  for (const auto& [name, s] : of) {
    j["ms"][name] = {{"min", s.min}, {"median", s.median}};
    const HeadCounters& c = bench.counters(name);
    if (c.tokens == 0) continue;
    const auto tokens = static_cast<double>(c.tokens);
    j["heads"][name] = {{"rows_rescored_per_token", static_cast<double>(c.rows_rescored) / tokens},
                        {"widenings", c.widenings},
                        {"full_passes", c.full_passes},
                        {"tokens", c.tokens}};
  }
  const double bytes = 2.0 * static_cast<double>(options.vocab * options.hidden);
  const auto better = [&](double Times::*which) {
    return std::min(of["read_plain"].*which, of["read_ahead"].*which);
  };
  for (const auto& [label, which] : {std::pair{"min", &Times::min}, {"median", &Times::median}}) {
    const double read = better(which);
    // Clang 14 does not let a lambda capture a structured binding.
    const auto value = which;
    const auto ratio = [&](const char* name) { return of[name].*value / read; };
    j["ratios"][label] = {
        {"read_gb_per_s", bytes / read * 1e-6},
        {"f16_product_share_of_read_bandwidth", read / (of["f16_product"].*which)},
        {"certified_greedy_head_over_read_f16", ratio("certified greedy, head")},
        {"certified_greedy_token_over_read_f16", ratio("certified greedy")},
        {"certified_top_p_token_over_read_f16", ratio("certified top-p")},
        {"certified_top_p_over_full_top_p",
         of["certified top-p"].*which / (of["full top-p"].*which)}};
    if (options.folded) {
      j["ratios"][label]["folded_over_certified_greedy_token"] =
          of["certified greedy, folded"].*which / (of["certified greedy"].*which);
    }
  }
  return j;
}

int run(int argc, char** argv) {
  const std::optional<Options> options = parse(argc, argv);
  if (!options) {
    std::fprintf(stderr,
                 "usage: cpu_client_bench [-t THREADS] [--shape VxH] [--rounds N] [--folder DIR]\n"
                 "                        [--on-request] [--folded]\n");
    return 2;
  }
  std::optional<BenchFolder> temporary;
  std::filesystem::path path = options->folder;
  if (path.empty()) {
    temporary.emplace("infemeral-cpu-client-bench");
    path = temporary->path;
  }
  if (!std::filesystem::exists(path / "engine.json")) {
    std::filesystem::create_directories(path);
    std::fprintf(stderr, "making the weights\n");
    check(make_bench_client(path, options->vocab, options->hidden, CloakMode::kEager));
  }
  if (options->folded && !std::filesystem::exists(path / "folded" / "engine.json")) {
    std::filesystem::create_directories(path / "folded");
    std::fprintf(stderr, "making the folded weights\n");
    check(make_bench_client(path / "folded", options->vocab, options->hidden, CloakMode::kFolded));
  }
  Bench bench(path, *options);
  std::fprintf(stderr, "%s, %d threads: ready in %.0f ms\n", bench.kernels().name, bench.threads(),
               bench.start_ms());
  std::map<std::string, std::vector<double>> samples;
  bench.round();  // warm up
  const auto one = [&] {
    const std::map<std::string, double> ms = bench.round();
    for (const auto& [name, value] : ms) samples[name].push_back(value);
    return ms;
  };
  if (options->on_request) {
    for (std::string line; std::getline(std::cin, line);) {
      std::printf("%s\n", Json(one()).dump().c_str());
      std::fflush(stdout);
    }
  } else {
    for (int i = 0; i < options->rounds; ++i) one();
  }
  if (!samples.empty()) std::printf("%s\n", summary(bench, *options, samples).dump().c_str());
  return 0;
}

}  // namespace
}  // namespace infemeral

int main(int argc, char** argv) {
  return infemeral::run(argc, argv);
}
