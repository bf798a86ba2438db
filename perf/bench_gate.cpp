#include "perf/bench_gate.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <optional>

#include "absl/strings/str_format.h"
#include "engine/text.h"

namespace infemeral {
namespace {

using Json = nlohmann::json;

// What must be equal for two times to mean the same.
constexpr const char* kModelFields[] = {"type", "hidden_size", "vocab_size", "tied_embeddings",
                                        "body"};
constexpr const char* kOptionFields[] = {"server",  "head",       "wire",           "cipher",
                                         "threads", "max_tokens", "prefill_tokens", "prompt_set"};

std::string shown(const Json& object, const char* field) {
  return object.contains(field) ? object[field].dump() : "nothing";
}

absl::Status check_report(const Json& report, std::string_view name) {
  const bool ours = report.is_object() && report.value("schema", "") == "infemeral-report";
  if (!ours || report.value("schema_version", 0) != 1) {
    return absl::InvalidArgumentError(
        cat(name, " is not a report of this version; record it again with engine_bench -o"));
  }
  for (const char* part : {"model", "options"}) {
    if (!report.contains(part) || !report[part].is_object()) {
      return absl::InvalidArgumentError(cat(name, " has no \"", part, "\""));
    }
  }
  if (!report.contains("cases") || !report["cases"].is_array()) {
    return absl::InvalidArgumentError(
        cat(name, " has no cases: only engine_bench's reports can be compared"));
  }
  return absl::OkStatus();
}

absl::Status check_same(const Json& current, const Json& baseline) {
  const auto compare = [&](const char* part, auto& fields) -> absl::Status {
    for (const char* field : fields) {
      const std::string a = shown(current[part], field), b = shown(baseline[part], field);
      if (a != b) {
        return absl::InvalidArgumentError(cat("the baseline was made with ", part, " ", field, " ",
                                              b, " and this report with ", a,
                                              "; their times mean different things"));
      }
    }
    return absl::OkStatus();
  };
  if (auto status = compare("model", kModelFields); !status.ok()) return status;
  return compare("options", kOptionFields);
}

struct Times {
  double ms = 0;
  double adjusted = 0;  // at the speed of the baseline's machine
};

std::optional<double> number(const Json& object, const char* field) {
  if (!object.is_object() || !object.contains(field) || !object[field].is_number()) return {};
  const double value = object[field].get<double>();
  if (!std::isfinite(value) || value < 0) return {};
  return value;
}

// Not the median: on a busy machine the loop's times fall into two heaps, and the median jumps from
// one to the other.
absl::StatusOr<double> calibration_ms(const Json& entry, std::string_view name) {
  const auto ms = number(entry.value("calibration", Json()), "p10_ms");
  if (!ms || *ms <= 0) {
    return absl::InvalidArgumentError(cat("case ", name, " has no calibration"));
  }
  return *ms;
}

bool same_machine(const Json& current, const Json& baseline) {
  const Json now = current.value("environment", Json::object());
  const Json before = baseline.value("environment", Json::object());
  for (const char* field : {"cpu", "logical_cores", "gpus"}) {
    if (!now.contains(field) || shown(now, field) != shown(before, field)) return false;
  }
  return true;
}

// How many times as long the machine takes for the same work. The loop is not steadier than what it
// is to judge: on the baseline's own kind of machine it may excuse, for a busy hour, but not
// accuse.
absl::StatusOr<double> slowdown_of_machine(const Json& now, const Json& before,
                                           std::string_view key, bool same) {
  const auto current = calibration_ms(now, key), baseline = calibration_ms(before, key);
  if (!current.ok()) return current.status();
  if (!baseline.ok()) return baseline.status();
  if (shown(now["calibration"], "loop") != shown(before["calibration"], "loop")) {
    return absl::InvalidArgumentError(
        cat("case ", key, " was calibrated by another loop in the baseline; record it anew"));
  }
  const double slowdown = *current / *baseline;
  return same ? std::max(slowdown, 1.0) : slowdown;
}

// The phases' p50s of both, in the current report's order.
struct PhasePair {
  std::string name;
  Times current, baseline;
};

std::vector<PhasePair> common_phases(const Json& current, const Json& baseline, double slowdown) {
  std::vector<PhasePair> pairs;
  const Json now = current.value("phases", Json::object());
  const Json before = baseline.value("phases", Json::object());
  for (const auto& [name, phase] : now.items()) {
    const auto a = number(phase, "p50_ms");
    const auto b = before.contains(name) ? number(before[name], "p50_ms") : 0.0;
    if (!a || !b) continue;
    pairs.push_back({name, {*a, *a / slowdown}, {*b, *b}});
  }
  return pairs;
}

// A phase that was not there before has no finite ratio.
double ratio_of(const Times& current, const Times& baseline) {
  if (baseline.adjusted > 0) return current.adjusted / baseline.adjusted;
  return current.adjusted > 0 ? 1e3 : 1;
}

std::string key_of(const Json& entry) {
  return entry.is_object() ? cat(entry.value("name", ""), "/", entry.value("backend", "")) : "";
}

absl::StatusOr<GateResult> compare(const Json& current, const Json& baseline,
                                   const GateOptions& options) {
  if (auto status = check_report(current, "this report"); !status.ok()) return status;
  if (auto status = check_report(baseline, "the baseline"); !status.ok()) return status;
  if (auto status = check_same(current, baseline); !status.ok()) return status;

  GateResult result;
  result.table = absl::StrFormat("%-16s %12s %12s %8s %10s  %s\n", "case", "baseline ms", "now ms",
                                 "ratio", "adjusted", "");
  const bool same = same_machine(current, baseline);
  int compared = 0;
  for (const Json& now : current["cases"]) {
    const std::string key = key_of(now);
    const auto before = std::find_if(baseline["cases"].begin(), baseline["cases"].end(),
                                     [&](const Json& entry) { return key_of(entry) == key; });
    if (before == baseline["cases"].end()) {
      absl::StrAppendFormat(&result.table, "%-16s not in the baseline\n", key);
      continue;
    }
    const auto a = number(now, "p50_ms"), b = number(*before, "p50_ms");
    if (!a || !b || *b <= 0) {
      return absl::InvalidArgumentError(cat("case ", key, " has no p50_ms"));
    }
    const auto slowdown = slowdown_of_machine(now, *before, key, same);
    if (!slowdown.ok()) return slowdown.status();
    ++compared;

    const Times whole{*a, *a / *slowdown}, whole_before{*b, *b};
    const double ratio = ratio_of(whole, whole_before);
    const double whole_growth = whole.adjusted - whole_before.adjusted;
    std::vector<Regression> found;
    const PhasePair* most = nullptr;  // the phase that grew most
    const auto phases = common_phases(now, *before, *slowdown);
    const auto growth = [](const PhasePair& p) { return p.current.adjusted - p.baseline.adjusted; };
    for (const PhasePair& phase : phases) {
      if (most == nullptr || growth(phase) > growth(*most)) most = &phase;
      const double phase_ratio = ratio_of(phase.current, phase.baseline);
      if (phase_ratio > options.max_ratio &&
          growth(phase) >= options.min_share * whole_before.adjusted &&
          whole_growth >= options.min_effect * growth(phase)) {
        found.push_back({now["name"], now["backend"], phase.name, phase.baseline.ms,
                         phase.current.ms, phase_ratio});
      }
    }
    if (ratio > options.max_ratio && found.empty()) {
      if (most != nullptr && growth(*most) > 0) {
        found.push_back({now["name"], now["backend"], most->name, most->baseline.ms,
                         most->current.ms, ratio_of(most->current, most->baseline)});
      } else {
        found.push_back({now["name"], now["backend"], "", *b, *a, ratio});
      }
    }
    absl::StrAppendFormat(&result.table, "%-16s %12.4f %12.4f %8.3f %10.3f  %s\n", key, *b, *a,
                          *a / *b, ratio, found.empty() ? "ok" : "SLOWER");
    for (const Regression& r : found) {
      if (r.phase.empty()) continue;
      absl::StrAppendFormat(&result.table, "    %-12s %12.4f %12.4f %8.3f %10.3f\n", r.phase,
                            r.baseline_ms, r.current_ms,
                            r.baseline_ms > 0 ? r.current_ms / r.baseline_ms : 0, r.ratio);
    }
    result.regressions.insert(result.regressions.end(), found.begin(), found.end());
  }
  if (compared == 0) {
    return absl::InvalidArgumentError("the two reports have no case in common");
  }
  std::stable_sort(result.regressions.begin(), result.regressions.end(),
                   [](const Regression& a, const Regression& b) { return a.ratio > b.ratio; });
  return result;
}

}  // namespace

absl::StatusOr<GateResult> compare_reports(const nlohmann::json& current,
                                           const nlohmann::json& baseline,
                                           const GateOptions& options) {
  try {
    return compare(current, baseline, options);
  } catch (const nlohmann::json::exception& error) {
    return absl::InvalidArgumentError(cat("one of the reports is damaged: ", error.what()));
  }
}

}  // namespace infemeral
