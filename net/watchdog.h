// Deadlines for calls that block inside a library: one thread that sleeps until the earliest of
// them.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <thread>
#include <utility>

namespace infemeral {

class Watchdog {
 public:
  using Clock = std::chrono::steady_clock;
  using Ticket = std::pair<Clock::time_point, std::uint64_t>;

  Watchdog();
  ~Watchdog();  // alarms that have not gone off are dropped
  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;

  // Calls `alarm` on the watchdog's thread once `deadline` has passed, unless it is disarmed.
  // Alarms are short and do not call back into the watchdog.
  Ticket arm(Clock::time_point deadline, std::function<void()> alarm);
  // When this returns, the alarm is not running and never will.
  void disarm(const Ticket& ticket);

 private:
  void run();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<Ticket, std::function<void()>> alarms_;
  std::uint64_t next_ = 0;
  std::uint64_t running_ = 0;  // of the alarm that is going off now, 0 for none
  // When the thread wakes by itself. Arming a later alarm does not disturb it, so that a step's
  // deadline costs no system call.
  Clock::time_point wake_at_ = Clock::time_point::max();
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace infemeral
