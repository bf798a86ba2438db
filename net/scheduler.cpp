#include "net/scheduler.h"

#include <algorithm>
#include <chrono>
#include <utility>

namespace infemeral {

Scheduler::Scheduler(Body& body) : body_(body), thread_([this] { run(); }) {}

Scheduler::~Scheduler() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  changed_.notify_one();
  thread_.join();
}

void Scheduler::submit(StepJob job) {
  {
    const std::lock_guard lock(mutex_);
    waiting_.push_back(std::move(job));
  }
  changed_.notify_one();
}

std::uint32_t Scheduler::waiting() const {
  const std::lock_guard lock(mutex_);
  return static_cast<std::uint32_t>(waiting_.size());
}

// Of every session its oldest waiting step: a run must not hold two of one session.
std::vector<StepJob> Scheduler::take_batch() {
  std::vector<StepJob> batch;
  std::deque<StepJob> rest;
  for (StepJob& job : waiting_) {
    const bool taken = std::any_of(batch.begin(), batch.end(), [&](const StepJob& other) {
      return other.session == job.session;
    });
    if (taken) {
      rest.push_back(std::move(job));
    } else {
      batch.push_back(std::move(job));
    }
  }
  waiting_ = std::move(rest);
  return batch;
}

void Scheduler::run() {
  const std::size_t hidden_size = body_.info().hidden_size;
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [&] { return stop_ || !waiting_.empty(); });
    if (stop_) break;
    std::vector<StepJob> batch = take_batch();
    lock.unlock();

    std::erase_if(batch, [](const StepJob& job) { return job.abandoned(); });
    std::vector<BodyStep> steps;
    steps.reserve(batch.size());
    for (StepJob& job : batch) {
      job.out.resize(output_rows(job.wanted, job.rows) * hidden_size);
      steps.push_back({.session = job.session->body.get(),
                       .start_pos = job.start_pos,
                       .rows = job.rows,
                       .states = job.states,
                       .wanted = job.wanted,
                       .out = job.out});
    }
    const auto start = std::chrono::steady_clock::now();
    if (!steps.empty()) body_.run(steps);
    const std::chrono::duration<double, std::milli> elapsed =
        std::chrono::steady_clock::now() - start;
    for (std::size_t i = 0; i < batch.size(); ++i) {
      batch[i].status = std::move(steps[i].status);
      batch[i].kv_len = batch[i].session->body->kv_len();
      batch[i].compute_ms = elapsed.count();
      batch[i].done(batch[i]);
    }
    // Sessions whose connection has ended go here, outside the lock.
    batch.clear();
    lock.lock();
  }
}

}  // namespace infemeral
