#include "net/scheduler.h"

#include <algorithm>
#include <iterator>
#include <new>
#include <utility>

namespace infemeral {
namespace {

using Jobs = std::list<StepJob>;

// In a batch, the steps that run as one stand next to each other: the end of those that begin at
// `first`.
Jobs::iterator run_end(Jobs& batch, Jobs::iterator first) {
  return std::find_if(std::next(first), batch.end(),
                      [&](const StepJob& job) { return job.session != first->session; });
}

// Whether `next` may be run together with what ends with `last`, as one step.
bool continues(const StepJob& last, const StepJob& next) {
  return last.wanted == Wanted::kNone && next.wanted != Wanted::kAll &&
         next.start_pos == last.start_pos + last.rows;
}

// False, with the status in the last one, when there is no memory for it.
bool join_rows(Jobs::iterator first, Jobs::iterator end) {
  try {
    for (auto job = std::next(first); job != end; ++job) {
      first->states.insert(first->states.end(), job->states.begin(), job->states.end());
    }
    return true;
  } catch (const std::bad_alloc&) {
    std::prev(end)->status = absl::ResourceExhaustedError("the server has no memory for this step");
    return false;
  }
}

}  // namespace

bool StepJob::make_room(std::size_t hidden_size) {
  try {
    out.resize(output_rows(wanted, rows) * hidden_size);
    return true;
  } catch (const std::bad_alloc&) {
    status = absl::ResourceExhaustedError("the server has no memory for this step's result");
    return false;
  }
}

Scheduler::Scheduler(Body& body, std::uint32_t joined_rows, Clock::duration quick_run)
    : body_(body), joined_rows_(joined_rows), quick_run_(quick_run), thread_([this] { run(); }) {}

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
    std::unique_lock lock(mutex_);
    const auto back = std::find_if(away_.begin(), away_.end(), [&](const auto& session) {
      return session.lock() == job.session;
    });
    if (back != away_.end()) {
      job.session->pause = Clock::now() - job.session->answered;
      away_.erase(back);
    }
    waiting_.push_back(std::move(job));
    if (runs_at_once()) run_batch(lock);
    if (waiting_.empty()) return;
  }
  changed_.notify_one();
}

bool Scheduler::runs_at_once() {
  const bool quick = decode_run_ > Clock::duration::zero() && decode_run_ < quick_run_;
  return quick && !running_ && waiting_.size() == 1 && waiting_.front().rows == 1 &&
         !expects_by(Clock::now() + patience());
}

std::uint32_t Scheduler::waiting() const {
  const std::lock_guard lock(mutex_);
  return static_cast<std::uint32_t>(waiting_.size());
}

// Sessions whose steps were answered together ask again at nearly the same time, and a run for the
// first of them alone would cost as much as one for all. So a run is put off for those that decode
// and are, by the pause that they made last time, about to ask; by no more than half a run, which
// is less than the pass over the weights that it saves.
void Scheduler::gather(std::unique_lock<std::mutex>& lock) {
  const Clock::time_point deadline = Clock::now() + patience();
  changed_.wait_until(lock, deadline, [&] { return stop_ || !expects_by(deadline); });
}

bool Scheduler::expects_by(Clock::time_point deadline) {
  const Clock::time_point now = Clock::now();
  bool expects = false;
  std::erase_if(away_, [&](const std::weak_ptr<ServedSession>& weak) {
    const std::shared_ptr<ServedSession> session = weak.lock();
    if (session == nullptr) return true;
    if (!session->pause) return false;  // what it does is not known yet
    const Clock::time_point due = session->answered + *session->pause;
    // One that is long overdue does something else now.
    expects |= due <= deadline && now <= due + patience();
    return false;
  });
  return expects;
}

// Before the answers leave: a session may be back before the last of them has.
void Scheduler::note_answers(Jobs& batch, Clock::duration elapsed) try {
  if (batch.empty()) return;
  const std::lock_guard lock(mutex_);
  const Clock::time_point now = Clock::now();
  const auto decodes = [](const StepJob& job) { return job.rows == 1; };
  if (std::all_of(batch.begin(), batch.end(), decodes)) decode_run_ = elapsed;
  for (auto first = batch.begin(); first != batch.end();) {
    const StepJob& job = *first;
    first = run_end(batch, first);
    const bool alone = &*std::prev(first) == &job;
    const auto same = [&](const StepJob& other) { return other.session == job.session; };
    if (!alone || !decodes(job) || std::any_of(waiting_.begin(), waiting_.end(), same)) continue;
    job.session->answered = now;
    away_.push_back(job.session);
  }
} catch (const std::bad_alloc&) {
  // A session that is not noted here is not waited for.
}

// Of every session its oldest waiting step, and those right behind it that continue it: a slow line
// brings the steps of a prompt one by one and each is run as it comes; from a fast one they wait
// here, and share one pass over the weights.
Jobs Scheduler::take_batch() {
  Jobs batch, rest;
  while (!waiting_.empty()) {
    const auto job = waiting_.begin();
    const auto same = [&](const StepJob& other) { return other.session == job->session; };
    const auto first = std::find_if(batch.begin(), batch.end(), same);
    if (first == batch.end()) {
      batch.splice(batch.end(), waiting_, job);
      continue;
    }
    const auto end = run_end(batch, first);
    const std::uint32_t rows = job->start_pos + job->rows - first->start_pos;
    // Behind one that stays, all stay: the order of a session's steps is kept.
    const bool joins = continues(*std::prev(end), *job) && rows <= joined_rows_ &&
                       std::none_of(rest.begin(), rest.end(), same);
    if (joins) {
      batch.splice(end, waiting_, job);
    } else {
      rest.splice(rest.end(), waiting_, job);
    }
  }
  waiting_ = std::move(rest);
  return batch;
}

void Scheduler::run() {
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [&] { return stop_ || (!waiting_.empty() && !running_); });
    gather(lock);
    if (stop_) break;
    run_batch(lock);
  }
}

// Of steps that run as one, the first gets the rows of all and the last the result.
void Scheduler::run_body(Jobs& batch) try {
  std::vector<BodyStep> steps;
  for (auto first = batch.begin(); first != batch.end();) {
    const auto end = run_end(batch, first);
    StepJob& last = *std::prev(end);
    if (join_rows(first, end) && last.make_room(body_.info().hidden_size)) {
      steps.push_back({.session = first->session->body.get(),
                       .start_pos = first->start_pos,
                       .rows = last.start_pos + last.rows - first->start_pos,
                       .states = first->states,
                       .wanted = last.wanted,
                       .out = last.out});
    }
    first = end;
  }
  if (!steps.empty()) body_.run(steps);
  auto step = steps.begin();
  for (auto first = batch.begin(); first != batch.end();) {
    const auto end = run_end(batch, first);
    StepJob& last = *std::prev(end);
    if (last.status.ok()) last.status = std::move((step++)->status);
    for (auto job = first; job != std::prev(end); ++job) job->status = last.status;
    first = end;
  }
} catch (const std::bad_alloc&) {
  for (StepJob& job : batch) {
    job.status = absl::ResourceExhaustedError("the server has no memory for this step");
  }
}

void Scheduler::run_batch(std::unique_lock<std::mutex>& lock) {
  running_ = true;
  Jobs batch = take_batch();
  lock.unlock();

  for (auto first = batch.begin(); first != batch.end();) {
    const auto end = run_end(batch, first);
    first = first->abandoned() ? batch.erase(first, end) : end;
  }
  const Clock::time_point start = Clock::now();
  run_body(batch);
  const Clock::duration took = Clock::now() - start;
  note_answers(batch, took);
  for (auto first = batch.begin(); first != batch.end();) {
    const auto end = run_end(batch, first);
    // Who asked for the first of several waits for all of them, and for the others no longer.
    first->compute_ms = std::chrono::duration<double, std::milli>(took).count();
    for (; first != end; ++first) {
      // Where the step itself ends, though the run may have gone on.
      first->kv_len = std::min(first->session->body->kv_len(), first->start_pos + first->rows);
      // Before the answer, and outside the lock: who has it may close the session, and finds its
      // place free then.
      first->session.reset();
      first->done(*first);
    }
  }
  batch.clear();
  lock.lock();
  running_ = false;
}

}  // namespace infemeral
