#include "tools/network_wait.h"

#include <sys/epoll.h>

#include <atomic>

namespace infemeral {
namespace {

using Clock = std::chrono::steady_clock;

std::atomic<Clock::time_point> asked = Clock::time_point::min();
static_assert(decltype(asked)::is_always_lock_free);

}  // namespace

void stay_awake_until(Clock::time_point when) {
  asked.store(when, std::memory_order_relaxed);
}

Clock::time_point awake_until() {
  return asked.load(std::memory_order_relaxed);
}

}  // namespace infemeral

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)

// epoll_pwait() without a signal mask is what the C library's epoll_wait() is.
extern "C" __attribute__((visibility("default"))) int epoll_wait(int epoll, epoll_event* events,
                                                                 int max_events, int timeout_ms) {
  using infemeral::Clock;
  const Clock::time_point begin = Clock::now();
  const std::chrono::milliseconds timeout(timeout_ms);
  Clock::time_point now = begin;
  while (timeout_ms != 0 && now < infemeral::awake_until()) {
    const int n = ::epoll_pwait(epoll, events, max_events, 0, nullptr);
    if (n != 0) return n;
    now = Clock::now();
    if (timeout_ms > 0 && now - begin >= timeout) return 0;
  }
  if (timeout_ms > 0) {
    timeout_ms -= static_cast<int>(
        std::chrono::duration_cast<std::chrono::milliseconds>(now - begin).count());
  }
  return ::epoll_pwait(epoll, events, max_events, timeout_ms, nullptr);
}

#endif
