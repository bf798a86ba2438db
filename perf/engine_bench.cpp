// engine_bench: how long the parts of a private token take, as a report that other programs read.
// docs/benchmarks.md says how to use it.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <optional>
#include <sstream>

#include "absl/strings/str_format.h"
#include "engine/json_file.h"
#include "engine/text.h"
#include "engine/version.h"
#include "perf/bench_cases.h"
#include "perf/bench_export.h"
#include "perf/bench_gate.h"
#include "perf/bench_suite.h"
#include "perf/dashboard_page.h"
#include "tools/cli.h"
#include "tools/console.h"
#include "tools/signals.h"

namespace infemeral {
namespace {

constexpr int kExitRegression = 1;
constexpr std::size_t kMaxReportBytes = std::size_t{1} << 30;

struct Options {
  BenchOptions bench;
  std::string from;
  std::string output;
  std::string export_format;
  std::string html;
  std::vector<std::string> history;
  std::string baseline;
  double max_ratio = 1.2;
  bool quiet = false;
};

void add_flags(CLI::App& app, Options& o) {
  const auto option = [&](const std::string& flags, auto& value, const std::string& help) {
    return with_env(app.add_option(flags, value, help));
  };
  auto* model = option("-m,--model", o.bench.model, "Folder that engine_prep wrote");
  option("--from", o.from, "Measure nothing: take this report instead")->excludes(model);
  option("--server", o.bench.server, "HOST:PORT of engine_serve, or \"local\"")
      ->capture_default_str();
  option("--server-key", o.bench.server_key, "The server's public key, or a file that holds it");
  option("--identity", o.bench.identity, "This client's secret key file, from engine_keygen");
  option("--case", o.bench.cases, "Only this case; may be given several times")
      ->check(
          CLI::IsMember(std::vector<std::string>(std::begin(kCaseNames), std::end(kCaseNames))));
  option("--backend", o.bench.backend, "cpu, cuda, or auto: each that is there, side by side")
      ->check(CLI::IsMember({"auto", "cpu", "cuda"}))
      ->capture_default_str();
  option("--gpu-memory", o.bench.gpu_memory, "auto, full or split, as engine_run")
      ->capture_default_str();
  option("-t,--threads", o.bench.threads, "Threads; 0 is one for each physical core")
      ->check(CLI::Range(0, 1024))
      ->capture_default_str();
  option("--head", o.bench.head, "certified, full, int8 or subset, as engine_run")
      ->capture_default_str();
  option("--wire", o.bench.wire, "Hidden states on the wire: f32, f16 or i8")
      ->capture_default_str();
  option("-n,--max-tokens", o.bench.max_tokens, "Tokens to generate for a prompt")
      ->check(CLI::Range(2u, 100000u))
      ->capture_default_str();
  option("--prefill-tokens", o.bench.prefill_tokens, "Tokens of the long prompt")
      ->check(CLI::Range(1u, 1000000u))
      ->capture_default_str();
  option("--warmups", o.bench.warmups, "Repetitions before those that count")
      ->check(CLI::Range(0, 1000))
      ->capture_default_str();
  option("--runs", o.bench.runs, "Repetitions that count")
      ->check(CLI::Range(1, 100000))
      ->capture_default_str();
  option("--sweep", o.bench.sweep,
         "Over slower lines too: rtt=0,10,20,50 (ms) or bandwidth=100M,1G (bits a second); both "
         "may be given");
  with_env(
      app.add_flag("--save-detailed", o.bench.save_detailed, "Every sample in the report too"));
  option("-o,--output", o.output, "Write the report to this file");
  option("--export", o.export_format,
         "On stdout instead of the table: github-smaller, github-bigger, google-benchmark, bencher "
         "or prometheus")
      ->check(CLI::IsMember(
          std::vector<std::string>(std::begin(kExportFormats), std::end(kExportFormats))));
  option("--html", o.html, "Write the dashboard, with the report inside, to this file");
  option("--history", o.history,
         "Reports, or what the peers' scripts wrote, that the dashboard shows beside it");
  option("--baseline", o.baseline, "Compare with this report; exit 1 when something is slower");
  option("--max-ratio", o.max_ratio, "How many times the baseline's p50 is still good")
      ->check(CLI::Range(1.0, 1000.0))
      ->capture_default_str();
  with_env(app.add_flag("--quiet", o.quiet, "Errors only on stderr"));
  add_version(app);
}

// Times of such a build would be taken for the product's.
absl::Status check_build() {
#ifdef NDEBUG
  const bool optimised = std::string_view(kBuildType) != "Debug" && kBuildType[0] != '\0';
#else
  const bool optimised = false;
#endif
  if (optimised && kSanitizers[0] == '\0') return absl::OkStatus();
  return absl::FailedPreconditionError(
      cat("this is a ", kSanitizers[0] != '\0' ? kSanitizers : kBuildType,
          " build, whose times say nothing: build with cmake --preset release"));
}

absl::StatusOr<nlohmann::json> read_report(const std::string& file) {
  auto text = read_text_file(file, kMaxReportBytes);
  if (!text.ok()) return text.status();
  return parse_json(*text, file);
}

// For the page: a report, or what a peers' script wrote, which may be a record a line.
absl::StatusOr<nlohmann::json> read_history(const std::string& file) {
  if (!file.ends_with(".jsonl")) return read_report(file);
  auto text = read_text_file(file, kMaxReportBytes);
  if (!text.ok()) return text.status();
  nlohmann::json records = nlohmann::json::array();
  std::istringstream lines(*text);
  for (std::string line; std::getline(lines, line);) {
    auto record = parse_json(line, file);
    if (!record.ok()) return record.status();
    records.push_back(*std::move(record));
  }
  return records;
}

std::string case_table(const nlohmann::json& report) {
  std::string table = absl::StrFormat("%-16s %8s %10s %10s %10s %10s %12s\n", "case", "samples",
                                      "p50 ms", "p90 ms", "p99 ms", "std ms", "items/s");
  for (const auto& c : report.at("cases")) {
    absl::StrAppendFormat(
        &table, "%-16s %8d %10.4f %10.4f %10.4f %10.4f %12.1f\n",
        cat(c.at("name").get<std::string>(), "/", c.at("backend").get<std::string>()),
        c.at("count").get<int>(), c.at("p50_ms").get<double>(), c.at("p90_ms").get<double>(),
        c.at("p99_ms").get<double>(), c.at("std_ms").get<double>(),
        c.at("items_per_second").get<double>());
  }
  return table;
}

std::string sweep_table(const nlohmann::json& report) {
  if (!report.contains("sweep")) return "";
  std::string table =
      absl::StrFormat("\n%-8s %8s %12s %12s %12s %12s %12s\n", "line", "rtt ms", "Mbit/s",
                      "ttft p50 ms", "limit ms", "tpot p50 ms", "limit ms");
  for (const auto& p : report.at("sweep")) {
    const double bits = p.at("bits_per_second").get<double>();
    absl::StrAppendFormat(&table, "%-8s %8.4g %12s %12.3f %12.3f %12.3f %12.3f\n",
                          p.at("backend").get<std::string>(), p.at("rtt_ms").get<double>(),
                          bits > 0 ? absl::StrFormat("%.6g", 1e-6 * bits) : "free",
                          p.at("p50_ttft_ms").get<double>(), p.at("limit_ttft_ms").get<double>(),
                          p.at("p50_tpot_ms").get<double>(), p.at("limit_tpot_ms").get<double>());
  }
  return table;
}

int exit_code(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kCancelled:
      return kExitInterrupted;
    case absl::StatusCode::kUnavailable:
    case absl::StatusCode::kDeadlineExceeded:
    case absl::StatusCode::kUnauthenticated:
    case absl::StatusCode::kPermissionDenied:
      return kExitServer;
    default:
      return kExitUsage;
  }
}

absl::Status write_dashboard(const Options& options, const nlohmann::json* report,
                             const std::optional<nlohmann::json>& baseline) {
  if (options.html.empty()) return absl::OkStatus();
  std::vector<std::pair<std::string, nlohmann::json>> reports;
  for (const std::string& file : options.history) {
    auto read = read_history(file);
    if (!read.ok()) return read.status();
    reports.emplace_back(std::filesystem::path(file).filename().string(), *std::move(read));
  }
  if (baseline) reports.emplace_back("baseline", *baseline);
  if (report != nullptr) reports.emplace_back("this report", *report);
  auto page = dashboard_page(reports);
  if (!page.ok()) return page.status();
  return replace_file(options.html, *page);
}

int run(const Options& options, std::stop_token stop) {
  const Console console({.quiet = options.quiet});
  const auto fail = [&](const absl::Status& status) {
    console.error(status);
    return exit_code(status);
  };
  // Before the measurement: it must not have been for nothing.
  for (const std::string& file : {options.output, options.html}) {
    if (auto status = check_output_place(file); !status.ok()) return fail(status);
  }
  if (options.bench.model.empty() && options.from.empty()) {
    if (!options.html.empty()) {  // the page alone, for reports that are opened in it
      const auto status = write_dashboard(options, nullptr, std::nullopt);
      return status.ok() ? kExitOk : fail(status);
    }
    return fail(absl::InvalidArgumentError("nothing to measure: give -m DIR, or --from REPORT"));
  }
  std::optional<nlohmann::json> baseline;
  if (!options.baseline.empty()) {
    auto read = read_report(options.baseline);
    if (!read.ok()) return fail(read.status());
    baseline = *std::move(read);
  }
  absl::StatusOr<nlohmann::json> report;
  if (options.from.empty()) {
    if (auto status = check_build(); !status.ok()) return fail(status);
    auto text = run_bench(options.bench, console, stop);
    if (!text.ok()) return fail(text.status());
    report = parse_json(*text, "the report");
    if (!report.ok()) return fail(report.status());
    if (!options.output.empty()) {
      if (auto status = replace_file(options.output, *text); !status.ok()) return fail(status);
    }
  } else {
    report = read_report(options.from);
    if (!report.ok()) return fail(report.status());
  }

  if (auto status = write_dashboard(options, &*report, baseline); !status.ok()) return fail(status);
  int code = kExitOk;
  std::string out;
  if (!options.export_format.empty()) {
    auto exported = export_report(*report, options.export_format);
    if (!exported.ok()) return fail(exported.status());
    out = *std::move(exported);
  }
  if (baseline) {
    const auto compared = compare_reports(*report, *baseline, {.max_ratio = options.max_ratio});
    if (!compared.ok()) return fail(compared.status());
    if (options.export_format.empty()) out = compared->table;
    for (const Regression& r : compared->regressions) {
      console.error(absl::AbortedError(absl::StrFormat(
          "%s on %s became slower%s: p50 %.4f ms, baseline %.4f ms, adjusted ratio %.3f", r.name,
          r.backend, r.phase.empty() ? "" : cat(" in the phase ", r.phase), r.current_ms,
          r.baseline_ms, r.ratio)));
      code = kExitRegression;
    }
  } else if (options.export_format.empty() && !report->contains("cases")) {
    if (options.html.empty()) {
      return fail(absl::InvalidArgumentError(
          cat(options.from,
              " holds no cases to show; --from takes a report of engine_bench -o, and "
              "with --html or --export prometheus also one of engine_run --report")));
    }
  } else if (options.export_format.empty()) {
    try {
      out = case_table(*report) + sweep_table(*report);
    } catch (const nlohmann::json::exception& error) {
      return fail(absl::InvalidArgumentError(cat("the report is damaged: ", error.what())));
    }
  }
  if (std::fwrite(out.data(), 1, out.size(), stdout) != out.size() || std::fflush(stdout) != 0) {
    return fail(absl::DataLossError("cannot write to stdout"));
  }
  return code;
}

}  // namespace
}  // namespace infemeral

int main(int argc, char** argv) {
  using namespace infemeral;
  SignalStop signals;
  Options options;
  CLI::App app(
      "Measures where the time of a private token goes, on every backend that there is, checks "
      "the\n"
      "results before it times them, and compares with an earlier report.\n"
      "Every option can also be set by an environment variable: --runs is INFEMERAL_RUNS.",
      "engine_bench");
  add_flags(app, options);
  if (auto code = parse_command_line(app, argc, argv)) return *code;
  return run(options, signals.token());
}
