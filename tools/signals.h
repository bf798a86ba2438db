// Ctrl-C and SIGTERM as a stop token.
#pragma once

#include <atomic>
#include <stop_token>
#include <thread>

namespace infemeral {

// Construct it in main() before any other thread: it blocks the signals for all threads that are
// made later and waits for them on one of its own. The first signal requests the stop; a second one
// ends the program at once with the usual status. SIGPIPE is ignored, so that a closed pipe is a
// write error that can be reported.
class SignalStop {
 public:
  SignalStop();
  ~SignalStop();
  SignalStop(const SignalStop&) = delete;
  SignalStop& operator=(const SignalStop&) = delete;

  std::stop_token token() const { return source_.get_token(); }
  // Blocks until a signal comes.
  void wait() const;

 private:
  std::stop_source source_;
  std::atomic<bool> ending_ = false;
  std::thread waiter_;
};

}  // namespace infemeral
