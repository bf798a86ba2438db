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
#include <stdexcept>
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
#include "kernels/rotate.h"
#include "perf/kernels_bench_device.h"
#include "tests/head_kernels.h"
#include "tests/test_random.h"

namespace infemeral {
namespace {

using cuda::Array;
using cuda::Place;

[[noreturn]] void fail(const std::string& what) {
  throw std::runtime_error(what);
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
      : lab_(lab), rows_(rows), kernels_(lab.stage, vocab, hidden) {
    const int stride = shape().stride;
    __half* lm_head = kernels_.weights.lm_head.data();
    kernels_.device(cloak_, hidden * static_cast<std::size_t>(stride));
    kernels_.device(packed_, cuda::packed_size(hidden));
    kernels_.device(half_states_, cuda::kMaxRows * static_cast<std::size_t>(stride));
    bench::fill_normal(lab.stage.stream, lm_head, vocab, hidden, stride, 1, rng()());
    // Any matrix will do for speed; with this scale states keep their size.
    bench::fill_normal(lab.stage.stream, cloak_.data(), hidden, hidden, stride,
                       1 / std::sqrt(static_cast<float>(hidden)), rng()());
    check(cuda::pack_matrix(lab.stage, cloak_.data(), hidden, false, packed_.data()), "pack");
    kernels_.quantise_rows(vocab);
    for (int i = 0; i < rows; ++i) {
      std::vector<float> row(hidden);
      for (float& x : row) x = normal();
      encode_wire_row(WireDtype::kF16, row, kernels_.wire.data() + i * 2 * hidden);
    }
    sample({});
  }

  void sample(SamplingParams params) {
    for (int i = 0; i < rows_; ++i) {
      params.seed = rng()();
      kernels_.write_request(i, {.params = params, .position = random_index(1000)}, 0);
    }
  }

  void uncloak() { kernels_.uncloak(rows_, packed_.data()); }
  void certified(bool greedy, bool with_scan) {
    kernels_.decode(rows_);
    uncloak();
    kernels_.int8_head(rows_);
    if (with_scan) kernels_.scan(rows_);
    kernels_.select(rows_, !greedy);
  }
  void greedy_from_device() {
    uncloak();
    kernels_.int8_head(rows_);
    kernels_.select(rows_, false);
  }
  void full() {
    kernels_.decode(rows_);
    uncloak();
    kernels_.full_head(rows_);
    kernels_.score_logits(rows_);
    kernels_.select(rows_, false, true);
  }
  void cublas(cublasHandle_t handle) {
    const float one = 1, zero = 0;
    const auto status = cublasGemmEx(
        handle, CUBLAS_OP_T, CUBLAS_OP_N, shape().vocab_size, rows_, shape().hidden_size, &one,
        kernels_.weights.lm_head.data(), CUDA_R_16F, shape().stride, half_states_.data(),
        CUDA_R_16F, shape().stride, &zero, kernels_.buffers.upper.data(), CUDA_R_32F,
        shape().vocab_size, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
    if (status != CUBLAS_STATUS_SUCCESS) fail("cublasGemmEx");
  }

  // Stages against the CPU; stops the program at a difference.
  void verify(const simd::Kernels& kernels, ThreadPool& pool) {
    const auto [hidden, vocab, stride, seen_words] = shape();
    sample({});
    certified(true, false);
    check(cudaStreamSynchronize(lab_.stage.stream), "certified");
    std::vector<float> states(static_cast<std::size_t>(rows_) * stride);
    check(cudaMemcpy(states.data(), kernels_.buffers.states.data(), states.size() * 4,
                     cudaMemcpyDefault),
          "copy");
    std::vector<std::uint16_t> head(static_cast<std::size_t>(vocab) * stride);
    check(cudaMemcpy(head.data(), kernels_.weights.lm_head.data(), head.size() * 2,
                     cudaMemcpyDefault),
          "copy");
    std::vector<std::uint16_t> cloak(static_cast<std::size_t>(hidden) * stride);
    check(cudaMemcpy(cloak.data(), cloak_.data(), cloak.size() * 2, cudaMemcpyDefault), "copy");
    const std::size_t v = vocab;
    const Matrix matrix{simd::Format::kF16, reinterpret_cast<const std::byte*>(head.data()), v,
                        static_cast<std::size_t>(stride)};
    std::vector<float> logits(v);
    const Rows out{logits.data(), v};
    const Linear linear_product{.weight = &matrix, .out = out};
    std::vector<float> upper(v);
    std::size_t rescored = 0;
    for (int i = 0; i < rows_; ++i) {
      // uncloak, in float64
      std::vector<float> wire(hidden);
      decode_wire_row(WireDtype::kF16, kernels_.wire.data() + i * 2 * hidden, wire);
      double worst = 0, scale = 0;
      for (int j = 0; j < hidden && i % 16 == 0; ++j) {
        double sum = 0;
        for (int c = 0; c < hidden; ++c) {
          sum += static_cast<double>(f16_to_f32(cloak[static_cast<std::size_t>(j) * stride + c])) *
                 wire[c];
        }
        worst = std::max(worst, std::fabs(sum - states[i * stride + j]));
        scale = std::max(scale, std::fabs(sum));
      }
      if (!(worst <= 1e-5 * scale)) fail("uncloak differs from the CPU");
      // the head, against the CPU's float16 product
      const Rows x{states.data() + i * stride, static_cast<std::size_t>(stride)};
      linear(kernels, pool, {&linear_product, 1}, x, 1);
      const auto best = std::max_element(logits.begin(), logits.end());
      const cuda::RowResult& result = kernels_.results[i];
      if (result.outcome != cuda::Outcome::kToken) fail("greedy is not certified");
      rescored += result.rows_rescored;
      const float gap = *best - logits[result.token];
      if (gap > 1e-4f * *best) fail("the certified token is not the CPU's best");
      check(cudaMemcpy(upper.data(), kernels_.buffers.upper.data() + i * cuda::score_stride(v),
                       v * 4, cudaMemcpyDefault),
            "copy");
      for (std::size_t t = 0; t < v; ++t) {
        if (!(upper[t] >= logits[t] && upper[t] < logits[t] + 0.5f * *best))
          fail("an interval does not hold");
      }
    }
    std::vector<std::int32_t> tokens(rows_);
    for (int i = 0; i < rows_; ++i) tokens[i] = kernels_.results[i].token;
    full();
    check(cudaStreamSynchronize(lab_.stage.stream), "full");
    for (int i = 0; i < rows_; ++i) {
      if (kernels_.results[i].token != tokens[i]) fail("certified and full head differ");
    }
    std::fprintf(stderr, "%dx%d, %d rows: checked; %.1f rows rescored a token\n", vocab, hidden,
                 rows_, static_cast<double>(rescored) / rows_);
  }

  void measure(cublasHandle_t handle) {
    const auto [hidden, vocab, stride, seen_words] = shape();
    const std::string label =
        rows_ > 1 ? cat(vocab, "x", hidden, "/", rows_) : cat(vocab, "x", hidden);
    const double q = 2.0 * hidden * stride, int8 = 1.0 * vocab * stride, f16 = 2 * int8;
    const auto time = [&](
                          const char* what, double bytes, const std::function<void()>& enqueue,
                          const std::function<void()>& before = [] {}) {
      const double us = lab_.time(enqueue, before);
      lab_.report(label, what, us, bytes);
    };
    const auto prepare = [&] { kernels_.decode(rows_); };
    time("decode", 0, [&] { kernels_.decode(rows_); });
    time(
        "uncloak", q, [&] { uncloak(); }, prepare);
    time(
        "int8_head", int8, [&] { kernels_.int8_head(rows_); }, prepare);
    time("reading the int8 copy", int8, [&] {
      check(bench::read_all(lab_.stage.stream, kernels_.weights.copy.data(),
                            kernels_.weights.copy.size(), lab_.stage.multiprocessors, lab_.sink()),
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
    certified_way("certified temperature 1", {.temperature = 1}, false);
    certified_way("certified min-p 0.05", {.temperature = 0.7f, .min_p = 0.05f}, false);
    certified_way("certified top-p 0.9", {.temperature = 0.7f, .top_p = 0.9f}, false);
    // What the peers do: from a row on the device.
    sample({});
    time(
        "certified greedy, row on device", q + int8, [&] { greedy_from_device(); }, prepare);
    time("full product (float16)", f16, [&] { kernels_.full_head(rows_); });
    time("full greedy", q + f16, [&] { full(); });
    print_stages();
    time("cuBLAS product (float16)", f16, [&] { cublas(handle); });
  }

 private:
  void print_stages() {
    const cuda::RowResult& r = kernels_.results[0];
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

  const cuda::ClientShape& shape() const { return kernels_.shape; }

  Lab& lab_;
  const int rows_;
  HeadKernels kernels_;
  Array<__half> cloak_, packed_, half_states_;
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
  try {
    return infemeral::run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "kernels_bench: %s\n", error.what());
    return 1;
  }
}
