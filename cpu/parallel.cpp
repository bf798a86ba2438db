#include "cpu/parallel.h"

#include <oneapi/tbb/info.h>
#include <oneapi/tbb/parallel_for.h>
#include <oneapi/tbb/task_arena.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <set>
#include <string>
#include <utility>

#include "engine/text.h"

namespace infemeral {

int physical_cores() {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) {
    return std::max(1, static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN)));
  }
  std::set<std::pair<int, int>> cores;  // package, core
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &allowed)) continue;
    const std::string topology = cat("/sys/devices/system/cpu/cpu", cpu, "/topology/");
    int package = 0, core = 0;
    std::ifstream(topology + "physical_package_id") >> package;
    // Where the kernel does not say, every CPU counts as a core.
    if (!(std::ifstream(topology + "core_id") >> core)) core = cpu;
    cores.emplace(package, core);
  }
  return std::max(1, static_cast<int>(cores.size()));
}

struct ThreadPool::Arena {
  explicit Arena(int threads) : arena(threads) {}
  tbb::task_arena arena;
};

ThreadPool::ThreadPool(int threads)
    : threads_(
          std::min(threads > 0 ? threads : physical_cores(), tbb::info::default_concurrency())) {
  if (threads_ > 1) arena_ = std::make_unique<Arena>(threads_);
}

ThreadPool::~ThreadPool() = default;

void ThreadPool::for_ranges(std::size_t n, std::size_t grain, std::size_t align,
                            absl::FunctionRef<void(const Range&)> body) {
  if (n == 0) return;
  // A few pieces a thread: a core that is busy with something else then delays one piece, not all.
  constexpr std::size_t kPiecesPerThread = 4;
  const std::size_t most = static_cast<std::size_t>(threads_) * kPiecesPerThread;
  std::size_t piece = std::max({(n + most - 1) / most, grain, std::size_t{1}});
  piece = (piece + align - 1) / align * align;
  const std::size_t pieces = (n + piece - 1) / piece;
  if (arena_ == nullptr || pieces == 1) {
    body({0, n, 0});
    return;
  }
  arena_->arena.execute([&] {
    tbb::parallel_for(
        std::size_t{0}, pieces,
        [&](std::size_t i) {
          const int worker = tbb::this_task_arena::current_thread_index();
          body({i * piece, std::min(n, (i + 1) * piece), static_cast<std::size_t>(worker)});
        },
        tbb::simple_partitioner());
  });
}

}  // namespace infemeral
