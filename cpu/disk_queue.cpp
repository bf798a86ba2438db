#include "cpu/disk_queue.h"

#include <utility>

namespace infemeral {
namespace {

constexpr std::size_t kMaxHeld = 256 << 20;

}  // namespace

DiskQueue::DiskQueue() : thread_([this](const std::stop_token& stop) { run(stop); }) {}

absl::Status DiskQueue::add(std::size_t bytes, Job job) {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return entries_.empty() || held_ + bytes <= kMaxHeld; });
  if (absl::Status status = outcome(); !status.ok()) return status;
  entries_.push_back({bytes, std::move(job)});
  held_ += bytes;
  changed_.notify_all();
  return absl::OkStatus();
}

absl::Status DiskQueue::finish() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return entries_.empty(); });
  return outcome();
}

absl::Status DiskQueue::outcome() const {
  if (thrown_ != nullptr) std::rethrow_exception(thrown_);
  return status_;
}

void DiskQueue::run(const std::stop_token& stop) {
  std::unique_lock lock(mutex_);
  while (changed_.wait(lock, stop, [&] { return !entries_.empty(); })) {
    if (stop.stop_requested()) return;
    if (status_.ok() && thrown_ == nullptr) {
      Job& job = entries_.front().job;  // stays where it is when others are added
      absl::Status status;
      std::exception_ptr thrown;
      lock.unlock();
      try {
        status = job();
      } catch (...) {
        thrown = std::current_exception();
      }
      lock.lock();
      status_ = std::move(status);
      thrown_ = thrown;
    }
    held_ -= entries_.front().bytes;
    entries_.pop_front();
    changed_.notify_all();
  }
}

}  // namespace infemeral
