// The CPU kernels against the limits of the machine: how fast all threads read memory, and how many
// multiply-adds they can do, both measured here, in the same run.
//
//   GB/s    weight bytes over time, beside ReadBandwidth
//   GFLOPS  two operations a multiply-add, beside FmaPeak
//
// INFEMERAL_ISA forces an instruction-set path.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <random>
#include <thread>
#include <vector>

#include "cpu/linear.h"
#include "cpu/parallel.h"
#include "cpu/simd/dispatch.h"
#include "engine/float16.h"

namespace infemeral {
namespace {

const simd::Kernels& kernels() {
  static const simd::Kernels* const chosen = [] {
    const auto found = simd::choose_kernels();
    if (!found.ok()) {
      std::fprintf(stderr, "%s\n", std::string(found.status().message()).c_str());
      std::exit(2);
    }
    return *found;
  }();
  return *chosen;
}

ThreadPool& pool() {
  static ThreadPool instance(0);
  return instance;
}

std::vector<float> random_floats(std::size_t n) {
  std::minstd_rand rng(1);
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::vector<float> x(n);
  for (float& v : x) v = uniform(rng);
  return x;
}

// Weights of a format; the values do not matter for speed, as long as they are ordinary numbers.
struct Weights {
  Weights(simd::Format format, std::size_t rows, std::size_t cols)
      : bytes(rows * cols * (format == simd::Format::kF32 ? 4 : 2)),
        matrix{format, bytes.data(), rows, cols} {
    const std::vector<float> pattern = random_floats(4096);
    for (std::size_t i = 0; i < rows * cols; ++i) {
      const float value = pattern[i % pattern.size()];
      if (format == simd::Format::kF32) {
        reinterpret_cast<float*>(bytes.data())[i] = value;
      } else {
        reinterpret_cast<std::uint16_t*>(bytes.data())[i] =
            format == simd::Format::kF16 ? f32_to_f16(value) : f32_to_bf16(value);
      }
    }
  }
  std::vector<std::byte> bytes;
  Matrix matrix;
};

void rate(benchmark::State& state, const char* name, double amount) {
  state.counters[name] =
      benchmark::Counter(amount * 1e-9, benchmark::Counter::kIsIterationInvariantRate);
}

// All threads add up a buffer larger than the caches, each its own contiguous part.
void ReadBandwidth(benchmark::State& state) {
  const std::size_t words = (std::size_t{512} << 20) / sizeof(std::uint64_t);
  const std::vector<std::uint64_t> buffer(words, 1);
  for (auto _ : state) {
    pool().for_ranges(words, 1 << 16, 64, [&](const Range& range) {
      std::uint64_t sums[8] = {};
      for (std::size_t i = range.begin; i + 8 <= range.end; i += 8) {
        for (std::size_t j = 0; j < 8; ++j) sums[j] += buffer[i + j];
      }
      benchmark::DoNotOptimize(sums);
    });
  }
  rate(state, "GB/s", static_cast<double>(words) * sizeof(std::uint64_t));
}
BENCHMARK(ReadBandwidth)->UseRealTime();

// A product small enough for the first-level cache: nothing but multiply-adds, and the ceiling that
// the tile itself reaches on one core, times the threads.
void TilePeak(benchmark::State& state) {
  const std::size_t m = 6, n = 4, k = 512;
  const std::vector<float> a = random_floats(m * k), w = random_floats(n * k);
  std::vector<std::vector<float>> c(static_cast<std::size_t>(pool().threads()),
                                    std::vector<float>(m * n));
  for (auto _ : state) {
    pool().for_ranges(c.size(), 1, 1, [&](const Range& range) {
      for (std::size_t t = range.begin; t < range.end; ++t) {
        for (int repeat = 0; repeat < 2000; ++repeat) {
          kernels().matmul[0]({a.data(), k, w.data(), k, c[t].data(), n, m, n, k});
        }
      }
    });
  }
  rate(state, "GFLOPS", 2.0 * m * n * k * 2000 * static_cast<double>(c.size()));
}
BENCHMARK(TilePeak)->UseRealTime();

// args: format, rows of activations, rows of weights, columns.
void MatMul(benchmark::State& state) {
  const auto format = static_cast<simd::Format>(state.range(0));
  const auto m = static_cast<std::size_t>(state.range(1));
  const Weights w(format, static_cast<std::size_t>(state.range(2)),
                  static_cast<std::size_t>(state.range(3)));
  std::vector<float> x = random_floats(m * w.matrix.cols), y(m * w.matrix.rows);
  const Linear product{&w.matrix, nullptr, {y.data(), w.matrix.rows}};
  for (auto _ : state) {
    linear(kernels(), pool(), {&product, 1}, {x.data(), w.matrix.cols}, m);
  }
  rate(state, "GB/s", static_cast<double>(w.bytes.size()));
  rate(state, "GFLOPS",
       2.0 * static_cast<double>(m) * static_cast<double>(w.matrix.rows * w.matrix.cols));
}
BENCHMARK(MatMul)
    ->ArgNames({"format", "m", "n", "k"})
    ->Args({1, 1, 49152, 576})
    ->Args({1, 1, 65536, 4096})
    ->Args({0, 1, 32768, 4096})
    ->Args({2, 1, 65536, 4096})
    ->Args({1, 1, 131072, 1536})
    ->Args({1, 2, 65536, 4096})
    ->Args({1, 4, 65536, 4096})
    ->Args({1, 8, 65536, 4096})
    ->Args({1, 16, 65536, 4096})
    ->Args({1, 256, 576, 576})
    ->Args({1, 256, 1536, 576})
    ->Args({1, 256, 576, 1536})
    ->Args({1, 256, 4096, 4096})
    ->Args({0, 256, 4096, 4096})
    ->Args({2, 256, 4096, 4096})
    ->UseRealTime()
    ->Unit(benchmark::kMicrosecond);

// Scores, softmax and the weighted sum of one head of 64 over 2048 positions.
void Attention(benchmark::State& state) {
  const auto m = static_cast<std::size_t>(state.range(0));
  const std::size_t positions = 2048, head_dim = 64;
  const Weights keys(simd::Format::kF16, positions, head_dim),
      values(simd::Format::kF16, positions, head_dim);
  const std::vector<float> q = random_floats(m * head_dim);
  std::vector<float> scores(m * positions), out(m * head_dim);
  for (auto _ : state) {
    kernels().matmul[1]({q.data(), head_dim, keys.bytes.data(), head_dim, scores.data(), positions,
                         m, positions, head_dim});
    for (std::size_t i = 0; i < m; ++i) {
      benchmark::DoNotOptimize(kernels().softmax(&scores[i * positions], positions, 0.125f));
    }
    std::fill(out.begin(), out.end(), 0.0f);
    kernels().accumulate[1]({scores.data(), positions, values.bytes.data(), head_dim, out.data(),
                             head_dim, m, head_dim, positions});
  }
  rate(state, "GFLOPS", 4.0 * static_cast<double>(m * positions * head_dim));
}
BENCHMARK(Attention)->ArgName("m")->Arg(1)->Arg(3)->Arg(32)->Unit(benchmark::kMicrosecond);

// What handing nothing to the other threads costs.
void EmptyLoop(benchmark::State& state) {
  for (auto _ : state) pool().for_ranges(64, 1, 8, [](const Range&) {});
}
BENCHMARK(EmptyLoop)->UseRealTime()->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace infemeral

BENCHMARK_MAIN();
