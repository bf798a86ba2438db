// Threads of the CPU backend: parallel loops over index ranges.
#pragma once

#include <cstddef>
#include <filesystem>
#include <istream>
#include <memory>
#include <optional>

#include "absl/functional/function_ref.h"

namespace infemeral {

// Physical cores that this process may run on (two hardware threads of one core count once: they
// share the units that these loops saturate), no more than its control group pays for; at least 1.
int physical_cores();

// Whole cores' worth of time that a control group gives, rounded up, as `docker --cpus` sets it:
// threads beyond them would stand still for most of every period. `membership` is the text of
// /proc/self/cgroup, `root` where version 2 of the groups is mounted. nullopt: no limit.
std::optional<int> cpu_quota(std::istream& membership, const std::filesystem::path& root);

// What one call of a parallel loop's body does.
struct Range {
  std::size_t begin = 0;
  std::size_t end = 0;
  std::size_t worker = 0;  // below ThreadPool::threads(); no two calls at once have the same
};

// Up to `threads` threads at once, the caller included. Pools of one process share one crew of
// worker threads, so a client and a body in one process, which take turns, do not fight for the
// machine; a loop that finds the crew at another pool's work is done by its caller alone. Workers
// stay awake for some tens of microseconds after a loop and then sleep. A pool may be used by one
// thread at a time; different pools by different threads.
class ThreadPool {
 public:
  // 0: physical_cores(); never more than the hardware threads that this process may run on.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return threads_; }

  // Calls body for ranges that make up [0, n), from several threads, and returns when
  // all are done. `grain` is the number of indices below which handing work to another thread
  // does not pay; ranges begin at multiples of `align`. Must not be nested. What body
  // throws is thrown again here, the first of several, when the other ranges are done.
  void for_ranges(std::size_t n, std::size_t grain, std::size_t align,
                  absl::FunctionRef<void(const Range&)> body);

 private:
  class Crew;
  std::shared_ptr<Crew> crew_;  // null for one thread
  int threads_;
};

}  // namespace infemeral
