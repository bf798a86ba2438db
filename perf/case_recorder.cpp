#include "perf/case_recorder.h"

#include <algorithm>
#include <utility>

namespace infemeral {

CaseResult new_case(std::string name, std::string item, std::uint64_t items, CalibrationLoop loop) {
  CaseResult result{.name = std::move(name), .item = std::move(item), .items = items};
  result.calibration = calibration_name(loop);
  for (const PhaseName& phase : kPhases) result.phases.push_back({.name = phase.name});
  return result;
}

void add_sample(CaseResult& result, double ms, const PhaseTimes& times) {
  result.samples_ms.push_back(ms);
  for (std::size_t i = 0; i < kPhases.size(); ++i) {
    result.phases[i].ms.push_back(times.*kPhases[i].value);
  }
}

CaseResult finished(CaseResult result) {
  std::erase_if(result.phases, [](const CaseResult::Phase& phase) {
    return std::all_of(phase.ms.begin(), phase.ms.end(), [](double ms) { return ms == 0; });
  });
  return result;
}

void append(std::vector<double>& to, std::span<const double> from) {
  to.insert(to.end(), from.begin(), from.end());
}

void append_run(CaseResult& all, CaseResult run) {
  const std::size_t before = all.samples_ms.size();
  if (before == 0) {
    all = std::move(run);
    return;
  }
  append(all.samples_ms, run.samples_ms);
  append(all.calibration_ms, run.calibration_ms);
  for (const CaseResult::Phase& phase : run.phases) {
    auto same = std::find_if(all.phases.begin(), all.phases.end(),
                             [&](const CaseResult::Phase& p) { return p.name == phase.name; });
    if (same == all.phases.end()) {
      same = all.phases.insert(same, {phase.name, std::vector<double>(before)});
    }
    append(same->ms, phase.ms);
  }
  for (CaseResult::Phase& phase : all.phases) phase.ms.resize(all.samples_ms.size());
}

absl::Status repeat(const BenchPlan& plan, std::string_view stage,
                    const std::function<absl::Status(bool measured)>& body) {
  const int total = plan.warmups + plan.runs;
  for (int i = 0; i < total; ++i) {
    if (plan.progress) plan.progress(stage, i, total);
    if (plan.stop.stop_requested()) return absl::CancelledError("the benchmark was interrupted");
    if (auto status = body(i >= plan.warmups); !status.ok()) return status;
  }
  return absl::OkStatus();
}

}  // namespace infemeral
