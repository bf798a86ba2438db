#include "tools/progress.h"

#include <algorithm>
#include <cstdio>

namespace infemeral {
namespace {

std::string duration_text(double seconds) {
  char text[32];
  const long s = static_cast<long>(seconds + 0.5);
  if (s >= 3600) {
    std::snprintf(text, sizeof(text), "%ldh%02ldm", s / 3600, s / 60 % 60);
  } else {
    std::snprintf(text, sizeof(text), "%ld:%02ld", s / 60, s % 60);
  }
  return text;
}

}  // namespace

void Progress::update(std::string_view stage, double done, double total) {
  if (!enabled_ || !(total > 0)) return;
  const auto now = Clock::now();
  if (stage != stage_) {
    stage_ = stage;
    stage_begin_ = now;
    first_done_ = done;
    last_draw_ = {};
  }
  if (done < total && now - last_draw_ < std::chrono::milliseconds(100)) return;
  last_draw_ = now;

  const double share = std::clamp(done / total, 0.0, 1.0);
  const double elapsed = std::chrono::duration<double>(now - stage_begin_).count();
  constexpr int kWidth = 30;
  const int filled = static_cast<int>(share * kWidth);
  std::string bar(static_cast<std::size_t>(filled), '#');
  bar.resize(kWidth, '.');
  std::string left;
  if (elapsed > 1 && done > first_done_ && done < total) {
    left = " left " + duration_text(elapsed * (total - done) / (done - first_done_));
  }
  // \r and erase to the end of the line: the bar is drawn over itself.
  std::fprintf(stderr, "\r%-12s [%s] %3d%%%s\x1b[K", stage_.c_str(), bar.c_str(),
               static_cast<int>(share * 100), left.c_str());
  std::fflush(stderr);
  drawn_ = true;
}

void Progress::clear() {
  if (!drawn_) return;
  std::fputs("\r\x1b[K", stderr);
  std::fflush(stderr);
  drawn_ = false;
  last_draw_ = {};
}

}  // namespace infemeral
