#include "engine/retry.h"

#include <algorithm>
#include <condition_variable>
#include <mutex>

#include "absl/strings/str_format.h"

namespace infemeral {

bool is_broken_line(const absl::Status& status) {
  return absl::IsUnavailable(status) || absl::IsDeadlineExceeded(status) ||
         absl::IsDataLoss(status);
}

std::chrono::milliseconds Retry::elapsed() const {
  if (attempts_ == 0) return {};
  return std::chrono::duration_cast<std::chrono::milliseconds>(Clock::now() - begin_);
}

std::chrono::milliseconds Retry::next_delay() {
  std::chrono::milliseconds delay = options_.first_delay;
  for (std::uint32_t i = 0; i < attempts_ && delay < options_.max_delay; ++i) delay *= 2;
  const std::int64_t most = std::min(delay, options_.max_delay).count();
  return std::chrono::milliseconds(
      std::uniform_int_distribution<std::int64_t>(most / 2, most)(random_));
}

absl::Status Retry::wait(const absl::Status& reason, std::stop_token stop) {
  if (options_.attempts == 0) return reason;
  const auto now = Clock::now();
  if (attempts_ == 0) begin_ = now;
  const std::chrono::milliseconds delay = next_delay();
  if (attempts_ == options_.attempts || now + delay > begin_ + options_.max_time) {
    return absl::Status(reason.code(),
                        absl::StrFormat("%s; gave up after %u attempts in %.1f s", reason.message(),
                                        attempts_, 1e-3 * static_cast<double>(elapsed().count())));
  }
  ++attempts_;
  std::mutex mutex;
  std::condition_variable_any woken;
  std::unique_lock lock(mutex);
  woken.wait_for(lock, stop, delay, [] { return false; });
  if (stop.stop_requested()) return absl::CancelledError("stopped while the server was away");
  return absl::OkStatus();
}

}  // namespace infemeral
