// A report in the formats that other programs read.
//
//   github-smaller     benchmark-action/github-action-benchmark, customSmallerIsBetter: latencies
//   github-bigger      the same action, customBiggerIsBetter: rates
//   google-benchmark   Google Benchmark's JSON, for its compare.py
//   bencher            Bencher Metric Format (bencher.dev): latency in ns, throughput a second
//   prometheus         text exposition format 0.0.4, for a textfile collector or a push gateway
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace infemeral {

inline constexpr std::string_view kExportFormats[] = {"github-smaller", "github-bigger",
                                                      "google-benchmark", "bencher", "prometheus"};

// `report` is engine_bench's or engine_run's. InvalidArgument for an unknown format, or for
// something that is not a report.
absl::StatusOr<std::string> export_report(const nlohmann::json& report, std::string_view format);

}  // namespace infemeral
