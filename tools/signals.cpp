#include "tools/signals.h"

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

namespace infemeral {
namespace {

// Wakes the waiting thread for the destructor.
constexpr int kWake = SIGUSR1;

sigset_t caught_signals(bool hangup) {
  sigset_t set;
  sigemptyset(&set);
  for (int signal : {SIGINT, SIGTERM, kWake}) sigaddset(&set, signal);
  if (hangup) sigaddset(&set, SIGHUP);
  return set;
}

}  // namespace

SignalStop::SignalStop(bool hangup) : catch_hangup_(hangup) {
  const sigset_t set = caught_signals(hangup);
  pthread_sigmask(SIG_BLOCK, &set, nullptr);
  signal(SIGPIPE, SIG_IGN);
  waiter_ = std::thread([this] {
    const sigset_t signals = caught_signals(catch_hangup_);
    for (int signal = 0; sigwait(&signals, &signal) == 0;) {
      if (ending_) return;
      if (signal == kWake) continue;  // somebody else's: not ours to end for
      if (signal == SIGHUP) {
        const std::lock_guard lock(mutex_);
        hangup_ = true;
        changed_.notify_all();
      } else if (!source_.request_stop() && repeats_end_) {
        _exit(128 + signal);
      }
    }
  });
}

SignalStop::~SignalStop() {
  ending_ = true;
  pthread_kill(waiter_.native_handle(), kWake);
  waiter_.join();
}

void SignalStop::wait(const std::function<void()>& on_hangup) {
  std::unique_lock lock(mutex_);
  while (changed_.wait(lock, source_.get_token(), [this] { return hangup_; })) {
    hangup_ = false;
    lock.unlock();
    if (on_hangup) on_hangup();
    lock.lock();
  }
}

}  // namespace infemeral
