// The kernel laboratory: every CUDA kernel of the client is checked against the CPU on fresh random
// data, then timed with a cold L2, beside the memory's measured reading speed and cuBLAS.
//
//   kernels_bench [--shape VxH]... [--rows N]... [--repetitions N]
//
// One line of JSON a measurement on stdout; a table on stderr. Times are medians in microseconds.
#include <cublas_v2.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "cpu/linear.h"
#include "cpu/parallel.h"
#include "cpu/simd/dispatch.h"
#include "engine/float16.h"
#include "engine/sampling.h"
#include "engine/text.h"
#include "engine/wire.h"
#include "kernels/device.h"
#include "kernels/full_head.h"
#include "kernels/int8_head.h"
#include "kernels/rotate.h"
#include "kernels/sample.h"
#include "kernels/wire.h"
#include "perf/kernels_bench_device.h"

namespace infemeral {
namespace {

using cuda::Array;
using cuda::Place;

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "kernels_bench: %s\n", what.c_str());
  std::exit(1);
}
void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) fail(std::string(what) + ": " + cudaGetErrorString(error));
}
template <typename T>
T value(absl::StatusOr<T> result) {
  if (!result.ok()) fail(std::string(result.status().message()));
  return *std::move(result);
}

std::mt19937_64& rng() {
  static std::mt19937_64 generator{std::random_device{}()};
  return generator;
}

class Lab {
 public:
  Lab(cuda::Device& device, int repetitions)
      : stage(device.stage),
        repetitions_(repetitions),
        flush_(value(Array<std::byte>::make(Place::kDevice, 256 << 20, usage))),
        sink_(value(Array<unsigned>::make(Place::kDevice, 1, usage))) {
    check(cudaEventCreate(&begin_), "event");
    check(cudaEventCreate(&end_), "event");
    bandwidth_ = 0;
    const std::size_t bytes = std::size_t{2} << 30;
    auto data = value(Array<std::byte>::make(Place::kDevice, bytes, usage));
    const double us = time([&] {
      check(bench::read_all(stage.stream, data.data(), bytes, stage.multiprocessors, sink_.data()),
            "read");
    });
    bandwidth_ = static_cast<double>(bytes) / us * 1e-6;
    std::fprintf(stderr, "read bandwidth: %.3f TB/s (%.0f us for 2 GiB)\n", bandwidth_, us);
    std::printf("{\"what\":\"read_bandwidth\",\"tb_per_s\":%.4f}\n", bandwidth_);
  }

  // Median over cold runs of what `enqueue` puts on the stream, replayed as a graph; `before` runs
  // ahead of each and is not timed.
  double time(
      const std::function<void()>& enqueue, const std::function<void()>& before = [] {}) {
    before();
    enqueue();
    check(cudaGetLastError(), "launch");
    cuda::Graph graph = value(cuda::record(stage, [&] {
      enqueue();
      return absl::OkStatus();
    }));
    std::vector<float> times;
    for (int i = 0; i < repetitions_ + 3; ++i) {
      before();
      // By reading: written lines would have to go back to memory first, in the time that counts.
      check(bench::read_all(stage.stream, flush_.data(), flush_.size(), stage.multiprocessors,
                            sink_.data()),
            "flush");
      check(cudaEventRecord(begin_, stage.stream), "event");
      check(cudaGraphLaunch(graph.get(), stage.stream), "graph");
      check(cudaEventRecord(end_, stage.stream), "event");
      check(cudaStreamSynchronize(stage.stream), "run");
      float ms = 0;
      check(cudaEventElapsedTime(&ms, begin_, end_), "event");
      if (i >= 3) times.push_back(ms * 1000);
    }
    std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
    return times[times.size() / 2];
  }

  void report(const std::string& shape, const char* what, double us, double bytes) const {
    const double rate = bytes / us * 1e-6;
    std::fprintf(stderr, "%-14s %-34s %9.2f us  %6.3f TB/s  %5.1f %% of reading\n", shape.c_str(),
                 what, us, rate, 100 * rate / bandwidth_);
    std::printf(
        "{\"shape\":\"%s\",\"what\":\"%s\",\"us\":%.3f,\"tb_per_s\":%.4f,"
        "\"share_of_read\":%.4f}\n",
        shape.c_str(), what, us, rate, rate / bandwidth_);
    std::fflush(stdout);
  }

  unsigned* sink() const { return sink_.data(); }

  cuda::Stage stage;
  cuda::DeviceUsage usage;

 private:
  const int repetitions_;
  Array<std::byte> flush_;
  Array<unsigned> sink_;
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
  double bandwidth_;
};

// lm_head, cloak and everything between a returned row and a token, for one shape.
class Head {
 public:
  Head(Lab& lab, int vocab, int hidden, int rows)
      : lab_(lab), vocab_(vocab), hidden_(hidden), stride_(cuda::padded(hidden)), rows_(rows) {
    const auto device = [&]<typename T>(Array<T>& array, std::size_t n) {
      array = value(Array<T>::make(Place::kDevice, n, lab.usage));
    };
    const std::size_t v = vocab, s = stride_, k = cuda::kMaxRows;
    device(lm_head_, v * s);
    device(cloak_, hidden * s);
    device(packed_, cuda::packed_size(hidden));
    device(copy_, cuda::int8_rows(v) * s);
    device(bounds_, cuda::int8_rows(v));
    device(largest_norm_, 1);
    device(cloaked_, k * s);
    device(states_, k * s);
    device(planes_, cuda::plane_bytes(cuda::kMaxRows, s));
    device(split_planes_, cuda::plane_bytes(cuda::kMaxRows, 2 * s));
    device(units_, k);
    device(row_states_, k);
    device(lower_, k * cuda::score_stride(v));
    device(upper_, k * cuda::score_stride(v));
    device(candidates_, k * cuda::kMaxCandidates);
    device(tokens_, k);
    device(seen_, k * (v / 32 + 1));
    device(half_states_, k * s);
    requests_ = value(Array<cuda::RowRequest>::make(Place::kPinned, k, lab.usage));
    results_ = value(Array<cuda::RowResult>::make(Place::kPinned, k, lab.usage));
    wire_ = value(Array<std::byte>::make(Place::kPinned, k * s * 4, lab.usage));
    bench::fill_normal(lab.stage.stream, lm_head_.data(), v, hidden, stride_, 1, rng()());
    // Any matrix will do for speed; with this scale states keep their size.
    bench::fill_normal(lab.stage.stream, cloak_.data(), hidden, hidden, stride_,
                       1 / std::sqrt(static_cast<float>(hidden)), rng()());
    check(cuda::pack_matrix(lab.stage, cloak_.data(), hidden, false, packed_.data()), "pack");
    check(cuda::quantise_rows(lab.stage, {.rows = lm_head_.data(),
                                          .vocab_size = vocab,
                                          .count = vocab,
                                          .hidden_size = hidden,
                                          .stride = stride_,
                                          .copy = copy_.data(),
                                          .bounds = bounds_.data(),
                                          .largest_norm = largest_norm_.data()}),
          "quantise_rows");
    for (int i = 0; i < rows; ++i) {
      std::vector<float> row(hidden);
      for (float& x : row) x = std::normal_distribution<float>()(rng());
      encode_wire_row(WireDtype::kF16, row, wire_.data() + i * 2 * hidden);
    }
    sample({});
  }

  void sample(const SamplingParams& params) {
    for (int i = 0; i < rows_; ++i) {
      cuda::RowRequest& r = requests_[i];
      r = {};
      r.inverse_temperature = params.greedy() ? 1 : 1 / params.temperature;
      r.repetition_penalty = params.repetition_penalty;
      r.top_p = params.top_p;
      r.min_p = params.min_p;
      r.top_k = params.top_k;
      r.seed = rng()();
      r.position = rng()() % 1000;
      r.selection = params.greedy()    ? cuda::Selection::kGreedy
                    : params.top_k > 0 ? cuda::Selection::kTopK
                    : params.top_p < 1 ? cuda::Selection::kNucleus
                    : params.min_p > 0 ? cuda::Selection::kMinP
                                       : cuda::Selection::kUnlimited;
    }
  }

  void decode() {
    check(cuda::decode(lab_.stage, {.wire = wire_.data(),
                                    .requests = requests_.data(),
                                    .seen = seen_.data(),
                                    .seen_copy = seen_.data(),
                                    .seen_words = vocab_ / 32 + 1,
                                    .dtype = WireDtype::kF16,
                                    .states = rows_,
                                    .hidden_size = hidden_,
                                    .stride = stride_,
                                    .out = cloaked_.data(),
                                    .split = {split_planes_.data(), units_.data()},
                                    .rows = row_states_.data()}),
          "decode");
  }
  void uncloak() {
    check(cuda::rotate(lab_.stage, {.matrix = packed_.data(),
                                    .rows = hidden_,
                                    .stride = stride_,
                                    .states = {split_planes_.data(), units_.data()},
                                    .n = rows_,
                                    .out = states_.data(),
                                    .started = &row_states_.data()->times.uncloak}),
          "uncloak");
  }
  void int8_head() {
    check(cuda::int8_head(lab_.stage, {.states = states_.data(),
                                       .n = rows_,
                                       .hidden_size = hidden_,
                                       .stride = stride_,
                                       .vocab_size = vocab_,
                                       .copy = copy_.data(),
                                       .bounds = bounds_.data(),
                                       .largest_norm = largest_norm_.data(),
                                       .planes = planes_.data(),
                                       .seen = seen_.data(),
                                       .seen_words = vocab_ / 32 + 1,
                                       .rows = row_states_.data(),
                                       .lower = lower_.data(),
                                       .upper = upper_.data()}),
          "int8_head");
  }
  cuda::Sample sampling() {
    return {.n = rows_,
            .vocab_size = vocab_,
            .stride = stride_,
            .rows = row_states_.data(),
            .lower = lower_.data(),
            .upper = upper_.data(),
            .lm_head = lm_head_.data(),
            .states = states_.data(),
            .seen = seen_.data(),
            .seen_words = vocab_ / 32 + 1,
            .candidates = candidates_.data(),
            .results = results_.data(),
            .tokens = tokens_.data()};
  }
  void scan() { check(cuda::scan(lab_.stage, sampling()), "scan"); }
  void select() { check(cuda::select(lab_.stage, sampling()), "select"); }
  void choose() { check(cuda::choose(lab_.stage, sampling()), "choose"); }
  void choose_full() { check(cuda::choose_full(lab_.stage, sampling()), "choose_full"); }
  void full_product() {
    check(cuda::full_head(lab_.stage, {.lm_head = lm_head_.data(),
                                       .vocab_size = vocab_,
                                       .stride = stride_,
                                       .states = states_.data(),
                                       .n = rows_,
                                       .logits = upper_.data(),
                                       .started = &row_states_.data()->times.de_embed}),
          "full head");
  }
  void certified(bool greedy, bool with_scan) {
    decode();
    uncloak();
    int8_head();
    if (with_scan) scan();
    select();
    if (!greedy) choose();
  }
  void greedy_from_device() {
    uncloak();
    int8_head();
    select();
  }
  void full() {
    decode();
    uncloak();
    full_product();
    choose_full();
  }
  void cublas(cublasHandle_t handle) {
    const float one = 1, zero = 0;
    const auto status = cublasGemmEx(handle, CUBLAS_OP_T, CUBLAS_OP_N, vocab_, rows_, hidden_, &one,
                                     lm_head_.data(), CUDA_R_16F, stride_, half_states_.data(),
                                     CUDA_R_16F, stride_, &zero, upper_.data(), CUDA_R_32F, vocab_,
                                     CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
    if (status != CUBLAS_STATUS_SUCCESS) fail("cublasGemmEx");
  }

  // Stages against the CPU; stops the program at a difference.
  void verify(const simd::Kernels& kernels, ThreadPool& pool) {
    sample({});
    certified(true, false);
    check(cudaStreamSynchronize(lab_.stage.stream), "certified");
    std::vector<float> states(static_cast<std::size_t>(rows_) * stride_);
    check(cudaMemcpy(states.data(), states_.data(), states.size() * 4, cudaMemcpyDefault), "copy");
    std::vector<std::uint16_t> head(static_cast<std::size_t>(vocab_) * stride_);
    check(cudaMemcpy(head.data(), lm_head_.data(), head.size() * 2, cudaMemcpyDefault), "copy");
    std::vector<std::uint16_t> cloak(static_cast<std::size_t>(hidden_) * stride_);
    check(cudaMemcpy(cloak.data(), cloak_.data(), cloak.size() * 2, cudaMemcpyDefault), "copy");
    const std::size_t v = vocab_;
    const Matrix matrix{simd::Format::kF16, reinterpret_cast<const std::byte*>(head.data()), v,
                        static_cast<std::size_t>(stride_)};
    std::vector<float> logits(v);
    const Rows out{logits.data(), v};
    const Linear linear_product{.weight = &matrix, .out = out};
    std::vector<float> upper(v);
    std::size_t rescored = 0;
    for (int i = 0; i < rows_; ++i) {
      // uncloak, in float64
      std::vector<float> wire(hidden_);
      decode_wire_row(WireDtype::kF16, wire_.data() + i * 2 * hidden_, wire);
      double worst = 0, scale = 0;
      for (int j = 0; j < hidden_ && i % 16 == 0; ++j) {
        double sum = 0;
        for (int c = 0; c < hidden_; ++c) {
          sum += static_cast<double>(f16_to_f32(cloak[static_cast<std::size_t>(j) * stride_ + c])) *
                 wire[c];
        }
        worst = std::max(worst, std::fabs(sum - states[i * stride_ + j]));
        scale = std::max(scale, std::fabs(sum));
      }
      if (!(worst <= 1e-5 * scale)) fail("uncloak differs from the CPU");
      // the head, against the CPU's float16 product
      const Rows x{states.data() + i * stride_, static_cast<std::size_t>(stride_)};
      linear(kernels, pool, {&linear_product, 1}, x, 1);
      const auto best = std::max_element(logits.begin(), logits.end());
      const cuda::RowResult& result = results_[i];
      if (result.outcome != cuda::Outcome::kToken) fail("greedy is not certified");
      rescored += result.rows_rescored;
      const float gap = *best - logits[result.token];
      if (gap > 1e-4f * *best) fail("the certified token is not the CPU's best");
      check(cudaMemcpy(upper.data(), upper_.data() + i * cuda::score_stride(v), v * 4,
                       cudaMemcpyDefault),
            "copy");
      for (std::size_t t = 0; t < v; ++t) {
        if (!(upper[t] >= logits[t] && upper[t] < logits[t] + 0.5f * *best))
          fail("an interval does not hold");
      }
    }
    std::vector<std::int32_t> tokens(rows_);
    for (int i = 0; i < rows_; ++i) tokens[i] = results_[i].token;
    full();
    check(cudaStreamSynchronize(lab_.stage.stream), "full");
    for (int i = 0; i < rows_; ++i) {
      if (results_[i].token != tokens[i]) fail("certified and full head differ");
    }
    std::fprintf(stderr, "%dx%d, %d rows: checked; %.1f rows rescored a token\n", vocab_, hidden_,
                 rows_, static_cast<double>(rescored) / rows_);
  }

  void measure(cublasHandle_t handle) {
    const std::string shape =
        rows_ > 1 ? cat(vocab_, "x", hidden_, "/", rows_) : cat(vocab_, "x", hidden_);
    const double q = 2.0 * hidden_ * stride_, int8 = 1.0 * vocab_ * stride_, f16 = 2 * int8;
    const auto time = [&](
                          const char* what, double bytes, const std::function<void()>& enqueue,
                          const std::function<void()>& before = [] {}) {
      const double us = lab_.time(enqueue, before);
      lab_.report(shape, what, us, bytes);
    };
    const auto prepare = [&] { decode(); };
    time("decode", 0, [&] { decode(); });
    time(
        "uncloak", q, [&] { uncloak(); }, prepare);
    time(
        "int8_head", int8, [&] { int8_head(); }, prepare);
    time("reading the int8 copy", int8, [&] {
      check(bench::read_all(lab_.stage.stream, copy_.data(), copy_.size(),
                            lab_.stage.multiprocessors, lab_.sink()),
            "read");
    });
    sample({});
    // From a row in the wire format in host memory to a token there.
    const auto certified_way = [&](const char* what, const SamplingParams& params, bool scans) {
      sample(params);
      time(what, q + int8, [&] { certified(params.greedy(), scans); });
      print_stages();
    };
    certified_way("certified greedy", {}, false);
    certified_way("certified top-k 50 top-p 0.9", {.temperature = 0.7f, .top_k = 50, .top_p = 0.9f},
                  true);
    certified_way("certified temperature 1", {.temperature = 1}, true);
    certified_way("certified min-p 0.05", {.temperature = 0.7f, .min_p = 0.05f}, false);
    certified_way("certified top-p 0.9", {.temperature = 0.7f, .top_p = 0.9f}, true);
    // What the peers do: from a row on the device.
    sample({});
    time(
        "certified greedy, row on device", q + int8, [&] { greedy_from_device(); }, prepare);
    time("full product (float16)", f16, [&] { full_product(); });
    time("full greedy", q + f16, [&] { full(); });
    print_stages();
    time("cuBLAS product (float16)", f16, [&] { cublas(handle); });
  }

 private:
  void print_stages() {
    const cuda::RowResult& r = results_[0];
    const auto us = [](unsigned long long a, unsigned long long b) {
      return static_cast<double>(static_cast<long long>(b - a)) / 1000;
    };
    std::fprintf(
        stderr,
        "    decode %.1f  uncloak %.1f  de_embed %.1f  sample %.1f  all %.1f us; outcome %d, "
        "%u rescored\n",
        us(r.times.decode, r.times.uncloak), us(r.times.uncloak, r.times.de_embed),
        us(r.times.de_embed, r.times.sample), us(r.times.sample, r.times.end),
        us(r.times.decode, r.times.end), static_cast<int>(r.outcome), r.rows_rescored);
  }

  Lab& lab_;
  const int vocab_, hidden_, stride_, rows_;
  Array<__half> lm_head_, cloak_, packed_, half_states_;
  Array<std::byte> copy_, planes_, split_planes_, wire_;
  Array<RowBound> bounds_;
  Array<float> units_, largest_norm_, cloaked_, states_, lower_, upper_;
  Array<cuda::RowState> row_states_;
  Array<cuda::ScoredToken> candidates_;
  Array<std::int32_t> tokens_;
  Array<std::uint32_t> seen_;
  Array<cuda::RowRequest> requests_;
  Array<cuda::RowResult> results_;
};

int run(int argc, char** argv) {
  std::vector<std::pair<int, int>> shapes;
  std::vector<int> row_counts;
  int repetitions = 50;
  for (int i = 1; i < argc; ++i) {
    int v = 0, h = 0;
    if (std::strcmp(argv[i], "--shape") == 0 && i + 1 < argc &&
        std::sscanf(argv[i + 1], "%dx%d", &v, &h) == 2 && v > 0 && h > 0) {
      shapes.emplace_back(v, h);
      ++i;
    } else if (std::strcmp(argv[i], "--rows") == 0 && i + 1 < argc &&
               std::sscanf(argv[i + 1], "%d", &v) == 1 && v > 0 && v <= cuda::kMaxRows) {
      row_counts.push_back(v);
      ++i;
    } else if (std::strcmp(argv[i], "--repetitions") == 0 && i + 1 < argc &&
               std::atoi(argv[i + 1]) > 0) {
      repetitions = std::atoi(argv[++i]);
    } else {
      std::fprintf(stderr,
                   "usage: kernels_bench [--shape VxH]... [--rows N]... [--repetitions N]\n");
      return 2;
    }
  }
  if (shapes.empty()) shapes = {{128256, 4096}, {49152, 576}, {32000, 4096}, {151936, 5120}};
  if (row_counts.empty()) row_counts = {1, 8, 32};
  cuda::Device device = value(cuda::open_device());
  cublasHandle_t handle = nullptr;
  if (cublasCreate(&handle) != CUBLAS_STATUS_SUCCESS) fail("cublasCreate");
  cublasSetStream(handle, device.stage.stream);
  const auto kernels = simd::choose_kernels();
  if (!kernels.ok()) fail(std::string(kernels.status().message()));
  ThreadPool pool(0);
  Lab lab(device, repetitions);
  for (const auto& [v, h] : shapes) {
    for (int rows : row_counts) {
      Head head(lab, v, h, rows);
      head.verify(**kernels, pool);
      head.measure(handle);
    }
  }
  cublasDestroy(handle);
  return 0;
}

}  // namespace
}  // namespace infemeral

int main(int argc, char** argv) {
  return infemeral::run(argc, argv);
}
