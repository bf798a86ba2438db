// How the cases repeat and keep their samples.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "engine/metrics.h"
#include "engine/report.h"
#include "perf/bench_cases.h"
#include "perf/calibration.h"

namespace infemeral {

using BenchClock = std::chrono::steady_clock;

inline double ms_since(BenchClock::time_point begin) {
  return std::chrono::duration<double, std::milli>(BenchClock::now() - begin).count();
}

// A case with a place for every phase of a token.
CaseResult new_case(std::string name, std::string item, std::uint64_t items, CalibrationLoop loop);
void add_sample(CaseResult& result, double ms, const PhaseTimes& times);
void append(std::vector<double>& to, std::span<const double> from);
// Without the phases that no sample spent time in.
CaseResult finished(CaseResult result);
// The same case's samples behind those that there are; `all` may be empty. A phase that one of them
// spent no time in is 0 there.
void append_run(CaseResult& all, CaseResult run);

// Calls body(measured) for the plan's warm-ups and then its runs; Cancelled when it is to stop.
absl::Status repeat(const BenchPlan& plan, std::string_view stage,
                    const std::function<absl::Status(bool measured)>& body);

}  // namespace infemeral
