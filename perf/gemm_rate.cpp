// The rate of engine/gemm.h's float32 product in the shape that engine_prep gives it, for
// perf/prep_rate.py: a block of rows times a square matrix.
//
//   gemm_rate [-t THREADS] [--size N] [--rows M] [--seconds S]
//
// stdout: one line of JSON with the best and the median rate of the repetitions in GFLOP/s.
#include <oneapi/tbb/task_arena.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <nlohmann/json.hpp>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "cpu/huge_pages.h"
#include "cpu/parallel.h"
#include "engine/gemm.h"

namespace infemeral {
namespace {

using Clock = std::chrono::steady_clock;

struct Options {
  int threads = 0;
  std::size_t size = 4096, rows = 1024;
  double seconds = 3;
};

std::optional<Options> parse(int argc, char** argv) {
  Options o;
  for (int i = 1; i < argc; i += 2) {
    if (i + 1 == argc) return std::nullopt;
    const std::string flag = argv[i];
    const double value = std::atof(argv[i + 1]);
    if (!(value >= 0 && value <= 1e6)) return std::nullopt;
    if (flag == "-t") {
      o.threads = static_cast<int>(value);
    } else if (flag == "--size") {
      o.size = static_cast<std::size_t>(value);
    } else if (flag == "--rows") {
      o.rows = static_cast<std::size_t>(value);
    } else if (flag == "--seconds") {
      o.seconds = value;
    } else {
      return std::nullopt;
    }
  }
  return o.size > 0 && o.rows > 0 ? std::optional(o) : std::nullopt;
}

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

int run(int argc, char** argv) {
  const std::optional<Options> options = parse(argc, argv);
  if (!options) {
    std::fprintf(stderr, "usage: gemm_rate [-t THREADS] [--size N] [--rows M] [--seconds S]\n");
    return 2;
  }
  const std::size_t n = options->size, m = options->rows;
  std::mt19937_64 rng(std::random_device{}());
  std::uniform_real_distribution<float> uniform(-1, 1);
  const auto draw = [&](std::size_t size) {
    HugeArray<float> values(size);
    for (std::size_t i = 0; i < size; ++i) values.data()[i] = uniform(rng);
    return values;
  };
  HugeArray<float> a = draw(m * n), b = draw(n * n), c = draw(m * n);

  const int threads = options->threads > 0 ? options->threads : physical_cores();
  tbb::task_arena arena(threads);
  const auto product = [&] {
    arena.execute([&] {
      const auto stride = static_cast<std::ptrdiff_t>(n);
      gemm_add(m, n, n, 1.0f, {a.data(), stride}, {b.data(), stride}, c.data(), n);
    });
  };
  product();  // starts the threads
  const double flops = 2 * static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(n);
  std::vector<double> rates;
  const auto begin = Clock::now();
  do {
    const auto start = Clock::now();
    product();
    rates.push_back(flops / seconds_since(start) * 1e-9);
  } while (seconds_since(begin) < options->seconds);
  std::sort(rates.begin(), rates.end());
  const nlohmann::ordered_json result = {{"kernel", gemm_kernel_name()},
                                         {"threads", threads},
                                         {"best", rates.back()},
                                         {"median", rates[rates.size() / 2]},
                                         {"repetitions", rates.size()}};
  std::printf("%s\n", result.dump().c_str());
  return 0;
}

}  // namespace
}  // namespace infemeral

int main(int argc, char** argv) {
  return infemeral::run(argc, argv);
}
