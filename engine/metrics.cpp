#include "engine/metrics.h"

#include <sys/resource.h>

namespace infemeral {

PhaseTimes since(const PhaseTimes& before, const PhaseTimes& now) {
  PhaseTimes added;
  for (const auto& [name, value] : kPhases) added.*value = now.*value - before.*value;
  return added;
}

std::size_t peak_rss_bytes() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<std::size_t>(usage.ru_maxrss) * 1024;  // Linux counts in KiB
}

}  // namespace infemeral
