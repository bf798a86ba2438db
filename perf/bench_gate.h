// Two reports of engine_bench, side by side: which case, and which phase of it, has become slower.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace infemeral {

struct GateOptions {
  double max_ratio = 1.2;
  // A phase that grew counts only if it made its case longer by this share: a phase of microseconds
  // that doubled is noise.
  double min_share = 0.02;
  // And only if the case grew by this share of the phase's growth: where two phases share a wait,
  // as network and body do, time moves between them from run to run.
  double min_effect = 0.5;
};

struct Regression {
  std::string name;  // of the case
  std::string backend;
  std::string phase;       // the slower phase; empty when the phases do not say
  double baseline_ms = 0;  // p50 of that phase, or of the case
  double current_ms = 0;
  double ratio = 0;  // current to baseline, at the speed of the baseline's machine
};

struct GateResult {
  std::vector<Regression> regressions;  // worst first
  std::string table;                    // for people: every case that both reports have
};

// p50 by p50. A case regresses when it is slower than max_ratio as a whole, or when one of its
// phases is, and that shows in the case (min_share, min_effect). The current times are first
// divided by what the calibration loops between both reports' samples say of the machine: how many
// times as long it takes now. Where processor, cores and GPUs are those of the baseline, never by
// less than 1: there a case fails only if its times as they are have grown as well.
// InvalidArgument when one of them is not a bench report of this version, when models, options or
// calibration loops differ, or when they have no case in common.
absl::StatusOr<GateResult> compare_reports(const nlohmann::json& current,
                                           const nlohmann::json& baseline,
                                           const GateOptions& options);

}  // namespace infemeral
