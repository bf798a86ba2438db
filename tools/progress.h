// A progress bar on stderr for people who wait: stage, share done, time left.
#pragma once

#include <chrono>
#include <string>
#include <string_view>

namespace infemeral {

// One thread at a time. Draws at most ten times a second; draws nothing when disabled.
class Progress {
 public:
  explicit Progress(bool enabled) : enabled_(enabled) {}
  ~Progress() { clear(); }
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  // `done` of `total` units of `stage`; a new stage starts a new estimate.
  void update(std::string_view stage, double done, double total);
  // Removes the bar, so that other lines can be printed.
  void clear();

 private:
  using Clock = std::chrono::steady_clock;
  const bool enabled_;
  bool drawn_ = false;
  std::string stage_;
  double first_done_ = 0;  // where the stage was when it was first seen
  Clock::time_point stage_begin_;
  Clock::time_point last_draw_;
};

}  // namespace infemeral
