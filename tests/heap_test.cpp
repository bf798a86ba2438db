// The heap of a program that serves: what is freed goes back to the system.
#include "tools/heap.h"

#include <malloc.h>
#include <unistd.h>

#include <atomic>
#include <catch2/catch.hpp>
#include <chrono>
#include <fstream>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

using namespace infemeral;

namespace {

constexpr std::size_t kMiB = 1 << 20;

std::size_t resident_bytes() {
  std::size_t total = 0, resident = 0;
  std::ifstream("/proc/self/statm") >> total >> resident;
  return resident * static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
}

// Counters only; every look may change them.
class CountingServer final : public BodyServer {
 public:
  int port() const override { return 0; }
  BodyServerCounters counters() const override {
    const std::lock_guard lock(mutex_);
    ++looks_;
    if (busy_) ++counters_.steps;
    return counters_;
  }
  absl::Status set_allow(std::vector<PublicKey>) override { return absl::OkStatus(); }
  void shutdown(std::chrono::milliseconds) override {}

  void come_and_go() {
    const std::lock_guard lock(mutex_);
    ++counters_.connections;
  }
  void be_busy(bool busy) {
    const std::lock_guard lock(mutex_);
    busy_ = busy;
  }
  void wait_for_looks(int n) const {
    const int until = looks_ + n;
    while (looks_ < until) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }

 private:
  mutable std::mutex mutex_;
  mutable BodyServerCounters counters_;
  mutable std::atomic<int> looks_ = 0;
  bool busy_ = false;
};

// 32 MiB of blocks that the heap does not map, freed below one that stays: in an arena of another
// thread, as gRPC's are.
class Leftovers {
 public:
  Leftovers() {
    std::thread([this] {
      constexpr std::size_t kBlock = 64 * 1024;
      std::vector<std::unique_ptr<char[]>> blocks;
      for (std::size_t i = 0; i < kBytes / kBlock; ++i) {
        blocks.push_back(std::make_unique<char[]>(kBlock));  // zeros: resident
      }
      stays_ = std::make_unique<char[]>(kBlock);
    }).join();
  }
  static constexpr std::size_t kBytes = 32 * kMiB;

 private:
  std::unique_ptr<char[]> stays_;
};

}  // namespace

TEST_CASE("a large block is a mapping of its own, whatever was freed before") {
  fix_heap_thresholds();
  for (const std::size_t bytes : {std::size_t{16} * kMiB, kMiB, std::size_t{130} * 1024}) {
    const std::size_t before = ::mallinfo2().hblks;
    auto block = std::make_unique<volatile char[]>(bytes);  // so that it is not optimised away
    CHECK(::mallinfo2().hblks == before + 1);
    block.reset();
    CHECK(::mallinfo2().hblks == before);
  }
}

TEST_CASE("what is free inside the heap goes back when conversations have changed and all rest") {
  fix_heap_thresholds();
  CountingServer server;
  const HeapTrimmer trimmer(server);
  server.wait_for_looks(5);
  const Leftovers leftovers;
  const std::size_t kept = resident_bytes();
  constexpr std::size_t kMost = Leftovers::kBytes / 4 * 3;

  // Nothing has come or gone.
  server.wait_for_looks(5);
  CHECK(resident_bytes() + kMost > kept);

  // A conversation has, but steps go on.
  server.be_busy(true);
  server.come_and_go();
  server.wait_for_looks(5);
  CHECK(resident_bytes() + kMost > kept);

  // And end.
  server.be_busy(false);
  server.wait_for_looks(5);
  CHECK(resident_bytes() + kMost <= kept);
}
