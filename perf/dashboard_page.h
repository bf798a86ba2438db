// The dashboard as one file that needs nothing else: perf/dashboard/ and the charting library,
// which are inside the program since its build, and reports.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <span>
#include <string>
#include <utility>

#include "absl/status/statusor.h"

namespace infemeral {

// Each report with the name that the page shows for it; there may be none. Unimplemented when the
// charting library was not found at build time.
absl::StatusOr<std::string> dashboard_page(
    std::span<const std::pair<std::string, nlohmann::json>> reports);

}  // namespace infemeral
