#include "cpu/parallel.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <exception>
#include <fstream>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "engine/text.h"

namespace infemeral {
namespace {

// The CPUs that this process may run on; empty where the kernel does not say.
std::vector<int> allowed_cpus() {
  std::vector<int> cpus;
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &allowed)) cpus.push_back(cpu);
  }
  return cpus;
}

int online_cpus() {
  return std::max(1, static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN)));
}

int hardware_threads() {
  const std::vector<int> cpus = allowed_cpus();
  return cpus.empty() ? online_cpus() : static_cast<int>(cpus.size());
}

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits awake until `ready`, at most for `time`; false if it never was. Spins at first, which is
// the quickest where every thread has a core, and then lets others run in between: where there are
// more threads than cores, one of those may be what is waited for.
template <typename Ready>
bool await(const Ready& ready, std::chrono::microseconds time) {
  constexpr auto kSpin = std::chrono::microseconds(5);
  constexpr int kPausesPerLook = 32;
  const auto begin = std::chrono::steady_clock::now();
  while (true) {
    for (int i = 0; i < kPausesPerLook; ++i) {
      if (ready()) return true;
      pause();
    }
    const auto waited = std::chrono::steady_clock::now() - begin;
    if (waited >= time) return ready();
    if (waited >= kSpin) std::this_thread::yield();
  }
}

// How long a worker stays awake after a loop: longer than the pauses between the loops of one
// forward pass, and short against a token.
constexpr auto kAwake = std::chrono::microseconds(50);

}  // namespace

std::optional<int> cpu_quota(std::istream& membership, const std::filesystem::path& root) {
  std::string line;
  while (std::getline(membership, line) && !line.starts_with("0::/")) {
  }
  if (!membership) return std::nullopt;
  // Every group above it limits it too.
  std::optional<int> least;
  std::filesystem::path group = std::filesystem::path(line.substr(4)).lexically_normal();
  while (true) {
    double quota = 0, period = 0;  // "max 100000" where there is none
    if (std::ifstream(root / group / "cpu.max") >> quota >> period && quota > 0 && period > 0) {
      const int cores = static_cast<int>(std::min(std::ceil(quota / period), 1e6));
      least = std::min(least.value_or(cores), cores);
    }
    if (group.empty()) return least;
    group = group.parent_path();
  }
}

int physical_cores() {
  const std::vector<int> cpus = allowed_cpus();
  if (cpus.empty()) return online_cpus();
  std::set<std::pair<int, int>> cores;  // package, core
  for (const int cpu : cpus) {
    const std::string topology = cat("/sys/devices/system/cpu/cpu", cpu, "/topology/");
    int package = 0, core = 0;
    std::ifstream(topology + "physical_package_id") >> package;
    // Where the kernel does not say, every CPU counts as a core.
    if (!(std::ifstream(topology + "core_id") >> core)) core = cpu;
    cores.emplace(package, core);
  }
  std::ifstream membership("/proc/self/cgroup");
  const int n = static_cast<int>(cores.size());
  return std::min(n, cpu_quota(membership, "/sys/fs/cgroup").value_or(n));
}

// The worker threads of a process. A loop is cut into pieces that its threads claim one by one, so
// that a thread which the system has put aside holds up the piece it is at and no other.
//
// What is to be claimed is one word, so that a worker that comes late can neither take a piece of a
// loop that is over nor look at its description: the number of the loop (32 bits), how many threads
// may work on it (16) and the pieces left (16).
class ThreadPool::Crew {
 public:
  using Piece = absl::FunctionRef<void(std::size_t piece, std::size_t worker)>;

  // The crew of the pools that exist now.
  static std::shared_ptr<Crew> shared() {
    static std::mutex mutex;
    static std::weak_ptr<Crew> current;
    const std::lock_guard lock(mutex);
    std::shared_ptr<Crew> crew = current.lock();
    if (crew == nullptr) {
      crew = std::make_shared<Crew>();
      current = crew;
    }
    return crew;
  }

  ~Crew() {
    stop_ = true;
    publish(0, 0);
    for (std::thread& worker : workers_) worker.join();
  }

  void grow(std::size_t workers) {
    const std::lock_guard lock(mutex_);
    while (workers_.size() < workers) {
      const std::size_t index = workers_.size() + 1;
      const std::uint64_t seen = work_.load(std::memory_order_relaxed);
      workers_.emplace_back([this, index, seen] { serve(index, seen); });
    }
  }

  // All pieces, by the caller (worker 0) and threads - 1 others; false if another loop is running.
  // The first exception of a piece is thrown again when all pieces have been tried.
  bool run(std::size_t threads, std::size_t pieces, Piece piece) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock()) return false;
    piece_ = &piece;
    pieces_ = pieces;
    done_.store(0, std::memory_order_relaxed);
    failed_.clear(std::memory_order_relaxed);
    publish(threads, pieces);
    claim(work_.load(std::memory_order_acquire), 0);
    const auto all_done = [&] { return done_.load(std::memory_order_acquire) == pieces; };
    while (!await(all_done, kAwake)) {
    }
    if (failure_ != nullptr) std::rethrow_exception(std::exchange(failure_, nullptr));
    return true;
  }

 private:
  static constexpr int kLoopShift = 32, kThreadsShift = 16;
  static constexpr std::uint64_t kField = 0xffff;
  static std::uint64_t loop_of(std::uint64_t work) { return work >> kLoopShift; }
  static std::uint64_t threads_of(std::uint64_t work) { return work >> kThreadsShift & kField; }
  static std::uint64_t left_of(std::uint64_t work) { return work & kField; }

  void publish(std::size_t threads, std::size_t pieces) {
    const std::uint64_t next = loop_of(work_.load(std::memory_order_relaxed)) + 1;
    work_.store(next << kLoopShift | threads << kThreadsShift | pieces, std::memory_order_seq_cst);
    if (sleeping_.load(std::memory_order_seq_cst) == 0) return;
    bell_.fetch_add(1, std::memory_order_release);
    bell_.notify_all();
  }

  void claim(std::uint64_t work, std::size_t worker) {
    const std::uint64_t loop = loop_of(work);
    while (loop_of(work) == loop && left_of(work) > 0) {
      if (!work_.compare_exchange_weak(work, work - 1, std::memory_order_acq_rel,
                                       std::memory_order_acquire)) {
        continue;
      }
      // The loop cannot end before this piece is done.
      try {
        (*piece_)(pieces_ - left_of(work), worker);
      } catch (...) {
        if (!failed_.test_and_set(std::memory_order_relaxed)) failure_ = std::current_exception();
      }
      done_.fetch_add(1, std::memory_order_release);
      work = work_.load(std::memory_order_acquire);
    }
  }

  void serve(std::size_t index, std::uint64_t seen) {
    const auto changed = [&] {
      return loop_of(work_.load(std::memory_order_acquire)) != loop_of(seen);
    };
    while (true) {
      while (!await(changed, kAwake)) sleep_unless(changed);
      seen = work_.load(std::memory_order_acquire);
      if (stop_) return;
      if (index < threads_of(seen)) claim(seen, index);
    }
  }

  // publish() either sees that this thread sleeps, or this thread sees what it published.
  template <typename Changed>
  void sleep_unless(const Changed& changed) {
    const std::uint32_t bell = bell_.load(std::memory_order_acquire);
    sleeping_.fetch_add(1, std::memory_order_seq_cst);
    std::atomic_thread_fence(std::memory_order_seq_cst);
    if (!changed()) bell_.wait(bell, std::memory_order_acquire);
    sleeping_.fetch_sub(1, std::memory_order_relaxed);
  }

  std::mutex mutex_;  // of the loop that runs, and of workers_
  std::vector<std::thread> workers_;
  std::atomic<bool> stop_ = false;

  // The loop that runs.
  const Piece* piece_ = nullptr;
  std::size_t pieces_ = 0;
  alignas(64) std::atomic<std::uint64_t> work_ = 0;
  alignas(64) std::atomic<std::size_t> done_ = 0;
  std::atomic_flag failed_;
  std::exception_ptr failure_;  // of the piece that set failed_; read when all are done

  alignas(64) std::atomic<std::uint32_t> sleeping_ = 0;
  std::atomic<std::uint32_t> bell_ = 0;  // rung for those who sleep
};

ThreadPool::ThreadPool(int threads)
    : threads_(std::min(threads > 0 ? threads : physical_cores(), hardware_threads())) {
  if (threads_ == 1) return;
  crew_ = Crew::shared();
  crew_->grow(static_cast<std::size_t>(threads_) - 1);
}

ThreadPool::~ThreadPool() = default;

void ThreadPool::for_ranges(std::size_t n, std::size_t grain, std::size_t align,
                            absl::FunctionRef<void(const Range&)> body) {
  if (n == 0) return;
  // A few pieces a thread: a core that is busy with something else then delays one piece, not all.
  constexpr std::size_t kPiecesPerThread = 4;
  const std::size_t most = static_cast<std::size_t>(threads_) * kPiecesPerThread;
  std::size_t size = std::max({(n + most - 1) / most, grain, std::size_t{1}});
  size = (size + align - 1) / align * align;
  const std::size_t pieces = (n + size - 1) / size;
  const bool shared = crew_ != nullptr && pieces > 1 &&
                      crew_->run(static_cast<std::size_t>(threads_), pieces,
                                 [&](std::size_t piece, std::size_t worker) {
                                   body({piece * size, std::min(n, (piece + 1) * size), worker});
                                 });
  if (!shared) body({0, n, 0});
}

}  // namespace infemeral
