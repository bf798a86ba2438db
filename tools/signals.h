// Ctrl-C and SIGTERM as a stop token.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <stop_token>
#include <thread>

namespace infemeral {

// Construct it in main() before any other thread: it blocks the signals for all threads that are
// made later and waits for them on one of its own. The first signal requests the stop; a second one
// ends the program at once with the usual status. SIGPIPE is ignored, so that a closed pipe is a
// write error that can be reported.
class SignalStop {
 public:
  // With `hangup`, SIGHUP is caught as well and given to wait(); otherwise it ends the program as
  // usual.
  explicit SignalStop(bool hangup = false);
  ~SignalStop();
  SignalStop(const SignalStop&) = delete;
  SignalStop& operator=(const SignalStop&) = delete;

  std::stop_token token() const { return source_.get_token(); }
  // As the first signal does; for any thread.
  void request_stop() { source_.request_stop(); }
  // From now on a second signal ends nothing: for a program that another one is to end, and that
  // may get the same signal from there and with its group.
  void ignore_repeats() { repeats_end_ = false; }
  // Blocks until the stop is requested. Calls `on_hangup` on this thread after every SIGHUP, once
  // for several that came close together.
  void wait(const std::function<void()>& on_hangup = {});

 private:
  std::stop_source source_;
  std::atomic<bool> ending_ = false;
  std::atomic<bool> repeats_end_ = true;
  const bool catch_hangup_;
  std::mutex mutex_;
  std::condition_variable_any changed_;
  bool hangup_ = false;
  std::thread waiter_;
};

}  // namespace infemeral
