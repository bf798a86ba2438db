#include "cpu/disk_queue.h"

#include <atomic>
#include <catch2/catch.hpp>
#include <chrono>
#include <future>
#include <new>
#include <thread>
#include <vector>

namespace infemeral {
namespace {

constexpr std::size_t kHuge = std::size_t{1} << 40;  // more than may wait

TEST_CASE("jobs run in order, and finish() waits for the last") {
  DiskQueue queue;
  std::vector<int> order;
  for (int i = 0; i < 100; ++i) {
    REQUIRE(queue
                .add(1,
                     [&order, i] {
                       order.push_back(i);
                       return absl::OkStatus();
                     })
                .ok());
  }
  REQUIRE(queue.finish().ok());
  REQUIRE(order.size() == 100);
  for (int i = 0; i < 100; ++i) CHECK(order[static_cast<std::size_t>(i)] == i);
}

TEST_CASE("after a job that fails none runs, and its error comes back") {
  DiskQueue queue;
  std::promise<void> go;
  std::atomic<int> ran = 0;
  const auto count = [&ran] {
    ++ran;
    return absl::OkStatus();
  };
  REQUIRE(queue
              .add(1,
                   [wait = go.get_future()]() mutable {
                     wait.get();
                     return absl::DataLossError("first");
                   })
              .ok());
  REQUIRE(queue.add(1, count).ok());  // the one before has not failed yet
  go.set_value();
  CHECK(queue.finish() == absl::DataLossError("first"));
  CHECK(queue.add(1, count) == absl::DataLossError("first"));
  CHECK(queue.finish() == absl::DataLossError("first"));
  CHECK(ran == 0);
}

TEST_CASE("what a job throws is thrown to the one who added it") {
  DiskQueue queue;
  REQUIRE(queue.add(1, []() -> absl::Status { throw std::bad_alloc(); }).ok());
  CHECK_THROWS_AS(queue.finish(), std::bad_alloc);
  CHECK_THROWS_AS(queue.add(1, [] { return absl::OkStatus(); }), std::bad_alloc);
}

TEST_CASE("a job that holds too much waits until it is alone, and then runs") {
  DiskQueue queue;
  std::atomic<bool> first_is_done = false;
  std::promise<void> go;
  REQUIRE(queue
              .add(1,
                   [&, wait = go.get_future()]() mutable {
                     wait.get();
                     first_is_done = true;
                     return absl::OkStatus();
                   })
              .ok());
  const auto release = std::async(std::launch::async, [&] { go.set_value(); });
  REQUIRE(queue.add(kHuge, [] { return absl::OkStatus(); }).ok());
  CHECK(first_is_done);
  CHECK(queue.finish().ok());
}

TEST_CASE("jobs that have not begun when the queue goes never run") {
  std::promise<void> begun, go;
  bool late = false;
  std::future<void> release;
  {
    DiskQueue queue;
    REQUIRE(queue
                .add(1,
                     [&, wait = go.get_future()]() mutable {
                       begun.set_value();
                       wait.get();
                       return absl::OkStatus();
                     })
                .ok());
    REQUIRE(queue
                .add(1,
                     [&] {
                       late = true;
                       return absl::OkStatus();
                     })
                .ok());
    begun.get_future().get();
    // The destructor has asked the thread to stop, most likely; either way nothing hangs.
    release = std::async(std::launch::async, [&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
      go.set_value();
    });
  }
  CHECK_FALSE(late);
}

}  // namespace
}  // namespace infemeral
