// Writing behind: what waits for the disk runs on a thread of its own while others compute.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <exception>
#include <mutex>
#include <stop_token>
#include <thread>

#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"

namespace infemeral {

// Jobs run one after the other in the order in which they came; after one that fails none runs.
// One thread adds them. What a job throws is thrown by the next add() or finish(). When the queue
// is destroyed, jobs that have not begun never do.
class DiskQueue {
 public:
  using Job = absl::AnyInvocable<absl::Status()>;

  DiskQueue();
  DiskQueue(const DiskQueue&) = delete;
  DiskQueue& operator=(const DiskQueue&) = delete;

  // `bytes`: what the job holds in memory. Waits until the jobs that are not done hold at most
  // 256 MiB with it, or there is none. Returns the error of an earlier job; then this one is
  // dropped.
  absl::Status add(std::size_t bytes, Job job);

  // Waits for all jobs. Returns the first error.
  absl::Status finish();

 private:
  struct Entry {
    std::size_t bytes;
    Job job;
  };
  void run(const std::stop_token& stop);
  absl::Status outcome() const;

  std::mutex mutex_;
  std::condition_variable_any changed_;
  std::deque<Entry> entries_;  // the first one is running
  std::size_t held_ = 0;       // bytes of all entries
  absl::Status status_;
  std::exception_ptr thrown_;
  std::jthread thread_;  // the last member: it uses the others
};

}  // namespace infemeral
