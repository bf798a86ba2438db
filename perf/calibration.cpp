#include "perf/calibration.h"

#include <atomic>
#include <chrono>
#include <cstdint>

namespace infemeral {
namespace {

using Clock = std::chrono::steady_clock;

// 16 MiB: of the memory's speed, as tokens are. Loops that fit a cache tell of the cache, and of
// who else uses it just then.
constexpr std::size_t kFloats = std::size_t{1} << 22;
constexpr int kHandoffs = 100;
constexpr std::size_t kLanes = 16;

double ms_since(Clock::time_point begin) {
  return std::chrono::duration<double, std::milli>(Clock::now() - begin).count();
}

// Sixteen sums side by side, which a compiler can keep in vector registers in any build.
float dot(const float* a, const float* b, std::size_t n) {
  float sums[kLanes] = {};
  for (std::size_t i = 0; i < n; i += kLanes) {
    for (std::size_t j = 0; j < kLanes; ++j) sums[j] += a[i + j] * b[i + j];
  }
  float sum = 0;
  for (float s : sums) sum += s;
  return sum;
}

}  // namespace

std::string_view calibration_name(CalibrationLoop loop) {
  return loop == CalibrationLoop::kCompute ? "compute-2" : "handoff-1";
}

Calibrator::Calibrator(int threads)
    : pool_(threads), values_(static_cast<std::size_t>(pool_.threads()) * kFloats) {
  for (std::size_t i = 0; i < values_.size(); ++i) {
    values_[i] = static_cast<float>(i % 251) / 251;
  }
  partner_ = std::thread([this] {
    std::unique_lock lock(mutex_);
    for (;;) {
      changed_.wait(lock, [&] { return turn_ == 1 || ending_; });
      if (ending_) return;
      turn_ = 0;
      changed_.notify_all();
    }
  });
}

Calibrator::~Calibrator() {
  {
    const std::lock_guard lock(mutex_);
    ending_ = true;
  }
  changed_.notify_all();
  partner_.join();
}

double Calibrator::run(CalibrationLoop loop) {
  return loop == CalibrationLoop::kCompute ? compute_ms() : handoff_ms();
}

double Calibrator::compute_ms() {
  const auto threads = static_cast<std::size_t>(pool_.threads());
  std::atomic<float> sink = 0;  // the sums must be worth computing
  const auto begin = Clock::now();
  pool_.for_ranges(threads, 1, 1, [&](const Range& range) {
    for (std::size_t t = range.begin; t < range.end; ++t) {
      const float* a = values_.data() + t * kFloats;
      sink = dot(a, a + kFloats / 2, kFloats / 2) + dot(a + kFloats / 2, a, kFloats / 2);
    }
  });
  return ms_since(begin);
}

double read_bytes_per_second(int threads, std::size_t bytes) {
  constexpr std::size_t kUnit = 64;  // a cache line
  constexpr std::size_t kAhead = 4096;
  ThreadPool pool(threads);
  const std::vector<std::uint64_t> words(bytes / sizeof(std::uint64_t), 1);
  double best_ms = 0;
  for (int pass = 0; pass < 8; ++pass) {
    // Fetching ahead helps some processors and hinders others.
    const std::size_t ahead = pass % 2 == 0 ? 0 : kAhead;
    const auto begin = Clock::now();
    pool.for_ranges(words.size(), 1 << 16, kUnit, [&](const Range& range) {
      constexpr std::size_t kSums = kUnit / sizeof(std::uint64_t);
      std::uint64_t sums[kSums] = {};
      for (std::size_t i = range.begin; i + kSums <= range.end; i += kSums) {
        if (ahead > 0) __builtin_prefetch(words.data() + i + ahead / sizeof(std::uint64_t));
        for (std::size_t j = 0; j < kSums; ++j) sums[j] += words[i + j];
      }
      for (std::uint64_t& sum : sums) asm volatile("" : : "r"(sum));
    });
    const double ms = ms_since(begin);
    if (pass == 0 || ms < best_ms) best_ms = ms;
  }
  return 1e3 * static_cast<double>(words.size() * sizeof(std::uint64_t)) / best_ms;
}

double Calibrator::handoff_ms() {
  const auto begin = Clock::now();
  std::unique_lock lock(mutex_);
  for (int i = 0; i < kHandoffs; ++i) {
    turn_ = 1;
    changed_.notify_all();
    changed_.wait(lock, [&] { return turn_ == 0; });
  }
  return ms_since(begin);
}

}  // namespace infemeral
