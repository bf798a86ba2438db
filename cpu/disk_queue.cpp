#include "cpu/disk_queue.h"

#include <exception>
#include <new>
#include <utility>

#include "engine/text.h"

namespace infemeral {
namespace {

constexpr std::size_t kMaxHeld = 256 << 20;

absl::Status run_job(DiskQueue::Job& job) {
  try {
    return job();
  } catch (const std::bad_alloc&) {
    return absl::ResourceExhaustedError("not enough memory to write this model");
  } catch (const std::exception& e) {
    return absl::InternalError(cat("writing failed: ", e.what()));
  }
}

}  // namespace

DiskQueue::DiskQueue() : thread_([this](const std::stop_token& stop) { run(stop); }) {}

absl::Status DiskQueue::add(std::size_t bytes, Job job) {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return entries_.empty() || held_ + bytes <= kMaxHeld; });
  if (!status_.ok()) return status_;
  entries_.push_back({bytes, std::move(job)});
  held_ += bytes;
  changed_.notify_all();
  return absl::OkStatus();
}

absl::Status DiskQueue::finish() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return entries_.empty(); });
  return status_;
}

void DiskQueue::run(const std::stop_token& stop) {
  std::unique_lock lock(mutex_);
  while (changed_.wait(lock, stop, [&] { return !entries_.empty(); })) {
    if (stop.stop_requested()) return;
    if (status_.ok()) {
      Job& job = entries_.front().job;  // stays where it is when others are added
      lock.unlock();
      absl::Status status = run_job(job);
      lock.lock();
      status_ = std::move(status);
    }
    held_ -= entries_.front().bytes;
    entries_.pop_front();
    changed_.notify_all();
  }
}

}  // namespace infemeral
