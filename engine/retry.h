// How long, and how often, something that broke is tried again.
#pragma once

#include <chrono>
#include <cstdint>
#include <random>
#include <stop_token>

#include "absl/status/status.h"

namespace infemeral {

struct RetryOptions {
  std::uint32_t attempts = 20;                 // for one break; 0: a break is final
  std::chrono::milliseconds max_time{300000};  // no attempt begins later than this after a break
  std::chrono::milliseconds first_delay{100};  // before the first attempt; doubles with each
  std::chrono::milliseconds max_delay{15000};
};

// True for what a new connection may mend: Unavailable, DeadlineExceeded and DataLoss.
bool is_broken_line(const absl::Status& status);

// The attempts to mend one break. Not thread-safe.
class Retry {
 public:
  using Clock = std::chrono::steady_clock;

  explicit Retry(const RetryOptions& options) : options_(options) {}

  // Sleeps until the next attempt may begin. The time is drawn from the upper half of the delay, so
  // that clients that lost the same server do not come back at once. `reason` with what was tried
  // when there are no attempts or no time left; Cancelled when `stop` is triggered.
  absl::Status wait(const absl::Status& reason, std::stop_token stop);

  std::uint32_t attempts() const { return attempts_; }  // begun so far
  std::chrono::milliseconds elapsed() const;            // since the first wait() began

 private:
  std::chrono::milliseconds next_delay();

  const RetryOptions options_;
  std::uint32_t attempts_ = 0;
  Clock::time_point begin_;
  std::mt19937_64 random_{std::random_device{}()};
};

}  // namespace infemeral
