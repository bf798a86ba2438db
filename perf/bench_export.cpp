#include "perf/bench_export.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <vector>

#include "absl/strings/str_format.h"
#include "engine/text.h"

namespace infemeral {
namespace {

using Json = nlohmann::json;
using OrderedJson = nlohmann::ordered_json;

constexpr const char* kLatencies[] = {"ttft", "tpot", "itl", "e2el"};

// engine_run's report is itself its only run.
std::vector<Json> runs_of(const Json& report) {
  if (report.contains("runs")) return report["runs"].get<std::vector<Json>>();
  Json run = report;
  run["backend"] = report.at("options").at("backend");
  return {run};
}

std::vector<Json> cases_of(const Json& report) {
  return report.contains("cases") ? report["cases"].get<std::vector<Json>>() : std::vector<Json>{};
}

std::string text(const Json& object, const char* field) {
  return object.at(field).get<std::string>();
}
double number(const Json& object, const std::string& field) {
  return object.at(field).get<double>();
}
std::string name_of(const Json& entry) {
  return cat(text(entry, "name"), "/", text(entry, "backend"));
}
std::string rate_unit(const Json& entry) {
  return cat(text(entry, "item"), "s/s");
}
// A run that generated nothing has no latencies.
bool has_tokens(const Json& run) {
  return run.at("tokens").at("output").get<std::uint64_t>() > 0;
}

std::vector<Json> sweep_of(const Json& report) {
  return report.contains("sweep") ? report["sweep"].get<std::vector<Json>>() : std::vector<Json>{};
}
constexpr const char* kSweepLatencies[] = {"ttft", "tpot"};
std::string line_speed(const Json& point) {
  const double bits = number(point, "bits_per_second");
  return bits > 0 ? absl::StrFormat("%.6gM", 1e-6 * bits) : "free";
}
// "sweep_ttft/rtt:20ms/line:100M/cpu"
std::string sweep_name(const Json& point, const char* latency) {
  return cat("sweep_", latency, "/rtt:", absl::StrFormat("%.6gms", number(point, "rtt_ms")),
             "/line:", line_speed(point), "/", text(point, "backend"));
}

std::string dump(const OrderedJson& json) {
  return json.dump(2) + "\n";
}

std::string github_smaller(const Json& report) {
  OrderedJson list = OrderedJson::array();
  const auto add = [&](const std::string& name, double value, double std) {
    list.push_back({{"name", name},
                    {"unit", "ms"},
                    {"value", value},
                    {"range", absl::StrFormat("± %.4g", std)},
                    {"extra", cat("git revision ", text(report.at("build"), "git_revision"))}});
  };
  for (const Json& c : cases_of(report)) {
    add(cat(name_of(c), " p50"), number(c, "p50_ms"), number(c, "std_ms"));
  }
  for (const Json& run : runs_of(report)) {
    if (!has_tokens(run)) continue;
    for (const char* latency : kLatencies) {
      add(cat(latency, "/", text(run, "backend"), " median"),
          number(run, cat("median_", latency, "_ms")), number(run, cat("std_", latency, "_ms")));
    }
  }
  for (const Json& point : sweep_of(report)) {
    for (const char* latency : kSweepLatencies) {
      add(cat(sweep_name(point, latency), " median"), number(point, cat("median_", latency, "_ms")),
          number(point, cat("std_", latency, "_ms")));
    }
  }
  return dump(list);
}

std::string github_bigger(const Json& report) {
  OrderedJson list = OrderedJson::array();
  for (const Json& c : cases_of(report)) {
    list.push_back(
        {{"name", name_of(c)}, {"unit", rate_unit(c)}, {"value", number(c, "items_per_second")}});
  }
  for (const Json& run : runs_of(report)) {
    if (!has_tokens(run)) continue;
    list.push_back({{"name", cat("output_throughput/", text(run, "backend"))},
                    {"unit", "tokens/s"},
                    {"value", number(run, "output_throughput")}});
  }
  return dump(list);
}

// One benchmark entry. The format has a CPU time beside the wall time; a report has only the wall
// time, which stands in both places.
OrderedJson gbench_entry(const std::string& name, std::size_t family, double ms,
                         std::size_t iterations) {
  return {{"name", name},
          {"family_index", family},
          {"per_family_instance_index", 0},
          {"run_name", name},
          {"run_type", "iteration"},
          {"repetitions", 1},
          {"repetition_index", 0},
          {"threads", 1},
          {"iterations", iterations},
          {"real_time", ms},
          {"cpu_time", ms},
          {"time_unit", "ms"}};
}

std::string google_benchmark(const Json& report) {
  OrderedJson benchmarks = OrderedJson::array();
  std::size_t family = 0;
  for (const Json& c : cases_of(report)) {
    const std::string name = name_of(c);
    const double rate = number(c, "items_per_second");
    std::vector<double> samples = c.value("samples_ms", std::vector<double>{});
    if (samples.empty()) {
      auto entry = gbench_entry(name, family, number(c, "p50_ms"), c.at("count"));
      entry["items_per_second"] = rate;
      benchmarks.push_back(std::move(entry));
    }
    // Each sample is a repetition of its own, so that compare.py's U test can be used.
    for (std::size_t i = 0; i < samples.size(); ++i) {
      auto entry = gbench_entry(name, family, samples[i], 1);
      entry["repetitions"] = samples.size();
      entry["repetition_index"] = i;
      benchmarks.push_back(std::move(entry));
    }
    if (!samples.empty()) {
      for (auto [aggregate, field] :
           {std::pair{"mean", "mean_ms"}, {"median", "median_ms"}, {"stddev", "std_ms"}}) {
        auto entry = gbench_entry(name, family, number(c, field), samples.size());
        entry["name"] = cat(name, "_", aggregate);
        entry["run_type"] = "aggregate";
        entry["repetitions"] = samples.size();
        entry.erase("repetition_index");
        entry["aggregate_name"] = aggregate;
        entry["aggregate_unit"] = "time";
        benchmarks.push_back(std::move(entry));
      }
    }
    ++family;
  }
  for (const Json& point : sweep_of(report)) {
    for (const char* latency : kSweepLatencies) {
      benchmarks.push_back(gbench_entry(sweep_name(point, latency), family++,
                                        number(point, cat("p50_", latency, "_ms")),
                                        point.at("requests")));
    }
  }
  const Json& environment = report.at("environment");
  OrderedJson context = {{"date", report.at("created")},
                         {"executable", report.at("tool")},
                         {"num_cpus", environment.at("logical_cores")},
                         {"caches", OrderedJson::array()},
                         {"library_build_type", "release"},
                         {"git_revision", report.at("build").at("git_revision")}};
  return dump({{"context", std::move(context)}, {"benchmarks", std::move(benchmarks)}});
}

std::string bencher(const Json& report) {
  OrderedJson result = OrderedJson::object();
  constexpr double kNs = 1e6;
  for (const Json& c : cases_of(report)) {
    OrderedJson& entry = result[name_of(c)];
    entry["latency"] = {{"value", kNs * number(c, "p50_ms")},
                        {"lower_value", kNs * number(c, "min_ms")},
                        {"upper_value", kNs * number(c, "p99_ms")}};
    entry["throughput"] = {{"value", number(c, "items_per_second")}};
  }
  for (const Json& run : runs_of(report)) {
    if (!has_tokens(run)) continue;
    for (const char* latency : kLatencies) {
      result[cat("request_", latency, "/", text(run, "backend"))]["latency"] = {
          {"value", kNs * number(run, cat("p50_", latency, "_ms"))},
          {"upper_value", kNs * number(run, cat("p99_", latency, "_ms"))}};
    }
  }
  for (const Json& point : sweep_of(report)) {
    for (const char* latency : kSweepLatencies) {
      result[sweep_name(point, latency)]["latency"] = {
          {"value", kNs * number(point, cat("p50_", latency, "_ms"))},
          {"upper_value", kNs * number(point, cat("p99_", latency, "_ms"))}};
    }
  }
  return dump(result);
}

// ---- Prometheus ----

// Label values come from files: the three characters that the format escapes.
std::string label(std::string_view value) {
  std::string escaped;
  for (char c : value) {
    if (c == '\\' || c == '"') escaped += '\\';
    escaped += c == '\n' ? std::string("\\n") : std::string(1, c);
  }
  return cat("\"", escaped, "\"");
}

class Metrics {
 public:
  void family(std::string_view name, std::string_view type, std::string_view help) {
    absl::StrAppend(&text_, cat("# HELP ", name, " ", help, "\n# TYPE ", name, " ", type, "\n"));
  }
  void sample(std::string_view name, const std::vector<std::pair<std::string, std::string>>& labels,
              double value) {
    std::vector<std::string> parts;
    for (const auto& [key, text] : labels) parts.push_back(cat(key, "=", label(text)));
    std::string joined;
    for (const std::string& part : parts) absl::StrAppend(&joined, joined.empty() ? "" : ",", part);
    absl::StrAppend(&text_, cat(name, "{", joined, "} "), absl::StrFormat("%.9g\n", value));
  }
  std::string take() { return std::move(text_); }

 private:
  std::string text_;
};

struct Quantile {
  const char* label;
  const char* percentile;
};
constexpr Quantile kQuantiles[] = {
    {"0.5", "p50"}, {"0.9", "p90"}, {"0.95", "p95"}, {"0.99", "p99"}};

std::string prometheus(const Json& report) {
  Metrics m;
  const Json& build = report.at("build");
  m.family("infemeral_build_info", "gauge", "What was measured; always 1.");
  m.sample("infemeral_build_info",
           {{"version", text(build, "version")},
            {"revision", text(build, "git_revision")},
            {"cpu", text(report.at("environment"), "cpu")}},
           1);

  const auto cases = cases_of(report);
  const auto runs = runs_of(report);
  if (!cases.empty()) {
    m.family("infemeral_bench_case_seconds", "summary", "One sample of a benchmark case.");
    for (const Json& c : cases) {
      const auto name = text(c, "name"), backend = text(c, "backend");
      for (const Quantile& q : kQuantiles) {
        m.sample("infemeral_bench_case_seconds",
                 {{"case", name}, {"backend", backend}, {"quantile", q.label}},
                 1e-3 * number(c, cat(q.percentile, "_ms")));
      }
      const double count = number(c, "count");
      m.sample("infemeral_bench_case_seconds_sum", {{"case", name}, {"backend", backend}},
               1e-3 * number(c, "mean_ms") * count);
      m.sample("infemeral_bench_case_seconds_count", {{"case", name}, {"backend", backend}}, count);
    }
    m.family("infemeral_bench_phase_seconds", "gauge", "Median time of a phase in a case.");
    for (const Json& c : cases) {
      for (const auto& [phase, value] : c.at("phases").items()) {
        m.sample("infemeral_bench_phase_seconds",
                 {{"case", text(c, "name")}, {"backend", text(c, "backend")}, {"phase", phase}},
                 1e-3 * number(value, "p50_ms"));
      }
    }
  }

  const auto gauge = [&](const char* name, const char* help, auto&& value_of) {
    m.family(name, "gauge", help);
    for (const Json& run : runs) m.sample(name, {{"backend", text(run, "backend")}}, value_of(run));
  };
  for (const char* latency : kLatencies) {
    const std::string name = cat("infemeral_", latency, "_seconds");
    m.family(name, "gauge", "Latency of requests, by quantile.");
    for (const Json& run : runs) {
      if (!has_tokens(run)) continue;
      for (const Quantile& q : kQuantiles) {
        m.sample(name, {{"backend", text(run, "backend")}, {"quantile", q.label}},
                 1e-3 * number(run, cat(q.percentile, "_", latency, "_ms")));
      }
    }
  }
  const auto points = sweep_of(report);
  for (const char* latency : kSweepLatencies) {
    if (points.empty()) break;
    const std::string name = cat("infemeral_sweep_", latency, "_seconds");
    const auto labels = [](const Json& point) {
      return std::vector<std::pair<std::string, std::string>>{
          {"backend", text(point, "backend")},
          {"rtt_ms", absl::StrFormat("%.6g", number(point, "rtt_ms"))},
          {"line", line_speed(point)}};
    };
    m.family(name, "gauge", "Latency over a line of this length and speed, by quantile.");
    for (const Json& point : points) {
      for (const Quantile& q : kQuantiles) {
        auto with_quantile = labels(point);
        with_quantile.emplace_back("quantile", q.label);
        m.sample(name, with_quantile, 1e-3 * number(point, cat(q.percentile, "_", latency, "_ms")));
      }
    }
    const std::string limit = cat("infemeral_sweep_", latency, "_limit_seconds");
    m.family(limit, "gauge", "What the line alone takes.");
    for (const Json& point : points) {
      m.sample(limit, labels(point), 1e-3 * number(point, cat("limit_", latency, "_ms")));
    }
  }
  m.family("infemeral_wire_bytes", "gauge",
           "Bytes of a run: tensor as made, packed after the codec, wire as handed to gRPC.");
  for (const Json& run : runs) {
    for (const char* direction : {"up", "down"}) {
      for (auto [stage, field] : {std::pair{"tensor", "tensor_bytes_"},
                                  {"packed", "packed_bytes_"},
                                  {"wire", "bytes_"}}) {
        m.sample("infemeral_wire_bytes",
                 {{"backend", text(run, "backend")}, {"direction", direction}, {"stage", stage}},
                 number(run.at("wire"), cat(field, direction)));
      }
    }
  }
  gauge("infemeral_output_tokens_per_second", "Tokens a second over a whole run.",
        [](const Json& run) { return number(run, "output_throughput"); });
  gauge("infemeral_peak_rss_bytes", "Largest resident set of the process.",
        [](const Json& run) { return number(run.at("memory"), "peak_rss_bytes"); });
  gauge("infemeral_device_peak_bytes", "Most device memory held.",
        [](const Json& run) { return number(run.at("memory"), "device_peak_bytes"); });
  gauge("infemeral_head_full_passes", "Tokens for which the whole float16 head was run.",
        [](const Json& run) { return number(run.at("head"), "full_passes"); });
  return m.take();
}

}  // namespace

absl::StatusOr<std::string> export_report(const nlohmann::json& report, std::string_view format) {
  if (std::find(std::begin(kExportFormats), std::end(kExportFormats), format) ==
      std::end(kExportFormats)) {
    return absl::InvalidArgumentError(
        cat("there is no export format ", quote_name(format),
            "; choose github-smaller, github-bigger, google-benchmark, bencher or prometheus"));
  }
  try {
    if (text(report, "schema") != "infemeral-report" ||
        report.at("schema_version").get<int>() != 1) {
      return absl::InvalidArgumentError(
          "not a report of this version; record it again with engine_bench -o");
    }
    if (format == "github-smaller") return github_smaller(report);
    if (format == "github-bigger") return github_bigger(report);
    if (format == "google-benchmark") return google_benchmark(report);
    if (format == "bencher") return bencher(report);
    return prometheus(report);
  } catch (const nlohmann::json::exception& error) {
    return absl::InvalidArgumentError(cat("the report is damaged: ", error.what()));
  }
}

}  // namespace infemeral
