// The body's one thread: takes the steps of all connections and runs them together.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
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
};

struct StepJob {
  std::shared_ptr<ServedSession> session;
  std::uint32_t start_pos = 0;
  std::uint32_t rows = 0;
  Wanted wanted = Wanted::kLast;
  std::vector<float> states;  // rows x H
  // Asked right before the run; a step that nobody waits for is dropped.
  std::function<bool()> abandoned;
  // Called on the scheduler's thread unless the step was dropped.
  std::function<void(StepJob&)> done;

  // Results.
  absl::Status status;
  std::vector<float> out;  // (0 | 1 | rows) x H
  std::uint32_t kv_len = 0;
  double compute_ms = 0;  // of the run that this step was part of
};

class Scheduler {
 public:
  explicit Scheduler(Body& body);
  ~Scheduler();  // finishes the run in progress and drops what waits
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  void submit(StepJob job);
  std::uint32_t waiting() const;  // steps behind the run in progress

 private:
  void run();
  std::vector<StepJob> take_batch();

  Body& body_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<StepJob> waiting_;
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace infemeral
