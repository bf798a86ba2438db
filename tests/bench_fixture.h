// Reports of a benchmark, and the gate over them.
#pragma once

#include <catch2/catch.hpp>
#include <nlohmann/json.hpp>
#include <utility>
#include <vector>

#include "perf/bench_cases.h"
#include "perf/bench_gate.h"
#include "perf/line_sweep.h"

namespace infemeral {

using Json = nlohmann::json;

inline const RunDescription kDescription = {
    .tool = "engine_bench",
    .model_type = "llama",
    .hidden_size = 8,
    .bench_options = {{"prefill_tokens", 4}, {"prompt_set", 1}}};

inline Json report_of(const std::vector<CaseResult>& cases, bool samples = false,
                      const std::vector<SweepPoint>& sweep = {}) {
  const ReportBuilder requests;
  const BenchRun run{.backend = "cpu", .backend_name = "cpu (test)", .requests = &requests};
  return Json::parse(bench_report_json(kDescription, {&run, 1}, cases, sweep, samples));
}

inline GateResult gate(const Json& current, const Json& baseline, GateOptions options = {}) {
  auto result = compare_reports(current, baseline, options);
  INFO(result.status().ToString());
  REQUIRE(result.ok());
  return *std::move(result);
}

}  // namespace infemeral
