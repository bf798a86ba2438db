// Takes the steps of all connections and runs them together on the body, one run after the other,
// so that sessions that decode at the same time share one pass over the weights, and so do the
// steps of a prompt that arrive faster than they are run.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "engine/body.h"
#include "net/admission.h"

namespace infemeral {

// A session as the server holds it: shared by its connection and by the steps that wait, so that
// it is destroyed after the last of them.
struct ServedSession {
  std::unique_ptr<SessionLease> lease;  // given back when the body's part is gone
  std::unique_ptr<BodySession> body;

  // The scheduler's own: when its last decode step was answered, and how long the session then took
  // to ask again, the last time that it did.
  std::chrono::steady_clock::time_point answered;
  std::optional<std::chrono::steady_clock::duration> pause;
};

struct StepJob {
  std::shared_ptr<ServedSession> session;
  std::uint32_t start_pos = 0;
  std::uint32_t rows = 0;
  Wanted wanted = Wanted::kLast;
  std::vector<float> states;  // rows x H
  // Asked right before the run; a step that nobody waits for is dropped.
  std::function<bool()> abandoned;
  // Called once, on the queue's thread or by submit(), unless the step was dropped; `session` is
  // null by then.
  std::function<void(StepJob&)> done;

  // Before the run: sizes `out`. False, with a status, when there is no memory for it.
  bool make_room(std::size_t hidden_size);

  // Results.
  absl::Status status;
  std::vector<float> out;  // (0 | 1 | rows) x H
  std::uint32_t kv_len = 0;
  // Of the run that this step was part of; of steps that ran as one, the first has it.
  double compute_ms = 0;
};

// Where connections leave their steps. May be called from any thread.
class StepQueue {
 public:
  virtual ~StepQueue() = default;
  virtual void submit(StepJob job) = 0;
  virtual std::uint32_t waiting() const = 0;  // steps behind the run in progress
};

class Scheduler final : public StepQueue {
 public:
  using Clock = std::chrono::steady_clock;

  // Waiting steps of one session are joined to runs of at most `joined_rows` rows. A body is quick
  // while a run of decode steps takes less than `quick_run`.
  Scheduler(Body& body, std::uint32_t joined_rows, Clock::duration quick_run);
  ~Scheduler() override;  // finishes the run in progress and drops what waits
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  // Returns at once; but where the body is quick, and this step is all there is for it to do, runs
  // the step here: another thread would take longer to wake than the body to run.
  void submit(StepJob job) override;
  std::uint32_t waiting() const override;

 private:
  void run();
  bool runs_at_once();
  void run_batch(std::unique_lock<std::mutex>& lock);
  void gather(std::unique_lock<std::mutex>& lock);
  bool expects_by(Clock::time_point deadline);
  Clock::duration patience() const { return decode_run_ / 2; }  // how long a run may be put off
  std::list<StepJob> take_batch();
  void run_body(std::list<StepJob>& batch);
  void note_answers(std::list<StepJob>& batch, Clock::duration elapsed);

  Body& body_;
  const std::uint32_t joined_rows_;
  const Clock::duration quick_run_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::list<StepJob> waiting_;
  std::vector<std::weak_ptr<ServedSession>> away_;  // decoding, and not waiting right now
  Clock::duration decode_run_{};                    // how long the last run of these took; 0: none
  bool running_ = false;
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace infemeral
