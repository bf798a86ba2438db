#include "tools/signals.h"

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <condition_variable>
#include <mutex>

namespace infemeral {
namespace {

// Wakes the waiting thread for the destructor.
constexpr int kWake = SIGUSR1;

sigset_t stop_signals() {
  sigset_t set;
  sigemptyset(&set);
  for (int signal : {SIGINT, SIGTERM, kWake}) sigaddset(&set, signal);
  return set;
}

}  // namespace

SignalStop::SignalStop() {
  const sigset_t set = stop_signals();
  pthread_sigmask(SIG_BLOCK, &set, nullptr);
  signal(SIGPIPE, SIG_IGN);
  waiter_ = std::thread([this] {
    const sigset_t signals = stop_signals();
    for (int signal = 0; sigwait(&signals, &signal) == 0;) {
      if (ending_) return;
      if (signal == kWake) continue;  // somebody else's: not ours to end for
      if (!source_.request_stop()) _exit(128 + signal);
    }
  });
}

SignalStop::~SignalStop() {
  ending_ = true;
  pthread_kill(waiter_.native_handle(), kWake);
  waiter_.join();
}

void SignalStop::wait() const {
  std::mutex mutex;
  std::condition_variable_any changed;
  std::unique_lock lock(mutex);
  changed.wait(lock, source_.get_token(), [] { return false; });
}

}  // namespace infemeral
