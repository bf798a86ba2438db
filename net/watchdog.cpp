#include "net/watchdog.h"

namespace infemeral {

Watchdog::Watchdog() : thread_([this] { run(); }) {}

Watchdog::~Watchdog() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

Watchdog::Ticket Watchdog::arm(Clock::time_point deadline, std::function<void()> alarm) {
  const std::lock_guard lock(mutex_);
  const Ticket ticket{deadline, ++next_};
  alarms_.emplace(ticket, std::move(alarm));
  if (deadline < wake_at_) changed_.notify_all();
  return ticket;
}

void Watchdog::disarm(const Ticket& ticket) {
  std::unique_lock lock(mutex_);
  alarms_.erase(ticket);
  changed_.wait(lock, [&] { return running_ != ticket.second; });
}

void Watchdog::run() {
  std::unique_lock lock(mutex_);
  while (!stop_) {
    const auto first = alarms_.begin();
    if (first == alarms_.end()) {
      wake_at_ = Clock::time_point::max();
      changed_.wait(lock);
    } else if (first->first.first > Clock::now()) {
      wake_at_ = first->first.first;
      // Not wait_until on an iterator's key: the alarm may be disarmed meanwhile.
      const Clock::time_point until = wake_at_;
      changed_.wait_until(lock, until);
    } else {
      running_ = first->first.second;
      const std::function<void()> alarm = std::move(first->second);
      alarms_.erase(first);
      lock.unlock();
      alarm();
      lock.lock();
      running_ = 0;
      changed_.notify_all();
    }
  }
}

}  // namespace infemeral
