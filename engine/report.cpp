#include "engine/report.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <numeric>

#include "absl/strings/str_format.h"
#include "engine/environment.h"
#include "engine/text.h"
#include "engine/version.h"

namespace infemeral {
namespace {

using Json = nlohmann::ordered_json;

double rounded(double ms) {
  return std::isfinite(ms) ? std::round(ms * 1e6) / 1e6 : 0;
}

Json build_json() {
  return {{"version", std::string(kVersion)},
          {"git_revision", std::string(kGitRevision)},
          {"build_type", std::string(kBuildType)},
          {"compiler", std::string(kCompiler)}};
}

Json environment_json(const RunDescription& run) {
  const Environment e = read_environment();
  Json json = {{"cpu", e.cpu},
               {"logical_cores", e.logical_cores},
               {"memory_bytes", e.memory_bytes},
               {"os", e.os},
               {"machine", e.machine},
               {"gpus", e.gpus},
               {"gpu_driver", e.gpu_driver}};
  if (run.read_bytes_per_second > 0) {
    json["read_bytes_per_second"] = std::round(run.read_bytes_per_second);
  }
  Json libraries = Json::object();
  for (const auto& [name, version] : run.libraries) libraries[name] = version;
  json["libraries"] = std::move(libraries);
  return json;
}

// What every report begins with.
Json head_json(const RunDescription& run) {
  Json json;
  json["schema"] = "infemeral-report";
  json["schema_version"] = 1;
  json["created"] = utc_now();
  json["tool"] = run.tool;
  json["build"] = build_json();
  json["environment"] = environment_json(run);
  json["model"] = {{"type", run.model_type},
                   {"hidden_size", run.hidden_size},
                   {"vocab_size", run.vocab_size},
                   {"tied_embeddings", run.tied_embeddings},
                   {"body", run.body}};
  Json options = Json::object();
  if (!run.backend.empty()) options["backend"] = run.backend;
  options.update({{"server", run.server},
                  {"head", run.head},
                  {"wire", run.wire},
                  {"cipher", run.cipher},
                  {"threads", run.threads},
                  {"max_tokens", run.max_tokens},
                  {"max_draft", run.max_draft}});
  for (const auto& [name, value] : run.bench_options) options[name] = value;
  json["options"] = std::move(options);
  return json;
}

void put_latency(Json& json, const std::string& name, std::span<const double> samples) {
  const Summary s = summarize(samples);
  json[cat("mean_", name, "_ms")] = rounded(s.mean);
  json[cat("median_", name, "_ms")] = rounded(s.median);
  json[cat("std_", name, "_ms")] = rounded(s.std);
  json[cat("p50_", name, "_ms")] = rounded(s.p50);
  json[cat("p90_", name, "_ms")] = rounded(s.p90);
  json[cat("p95_", name, "_ms")] = rounded(s.p95);
  json[cat("p99_", name, "_ms")] = rounded(s.p99);
}

Json phases_json(std::span<const TokenTiming> timings) {
  Json json = Json::object();
  std::vector<double> samples(timings.size());
  for (const PhaseName& phase : kPhases) {
    std::transform(timings.begin(), timings.end(), samples.begin(),
                   [&](const TokenTiming& t) { return t.phases.*phase.value; });
    const Summary s = summarize(samples);
    json[phase.name] = {{"mean_ms", rounded(s.mean)},
                        {"p50_ms", rounded(s.p50)},
                        {"p95_ms", rounded(s.p95)},
                        {"p99_ms", rounded(s.p99)}};
  }
  double total = 0, explained = 0;
  double least = timings.empty() ? 0 : 1;  // the token that the phases explain worst
  for (const TokenTiming& t : timings) {
    total += t.total_ms;
    explained += t.phases.sum();
    if (t.total_ms > 0) least = std::min(least, t.phases.sum() / t.total_ms);
  }
  json["total"] = {
      {"mean_ms", rounded(timings.empty() ? 0 : total / static_cast<double>(timings.size()))}};
  json["explained_share"] = rounded(total > 0 ? explained / total : 0);
  json["min_explained_share"] = rounded(least);
  return json;
}

Json token_json(const TokenTiming& timing) {
  Json json = Json::object();
  for (const PhaseName& phase : kPhases) json[phase.name] = rounded(timing.phases.*phase.value);
  json["total"] = rounded(timing.total_ms);
  return json;
}

Json summary_json(std::span<const double> samples) {
  const Summary s = summarize(samples);
  return {
      {"mean_ms", rounded(s.mean)}, {"median_ms", rounded(s.median)}, {"std_ms", rounded(s.std)},
      {"min_ms", rounded(s.min)},   {"p50_ms", rounded(s.p50)},       {"p90_ms", rounded(s.p90)},
      {"p95_ms", rounded(s.p95)},   {"p99_ms", rounded(s.p99)},       {"max_ms", rounded(s.max)}};
}

Json rounded_list(std::span<const double> samples) {
  Json list = Json::array();
  for (double ms : samples) list.push_back(rounded(ms));
  return list;
}

Json case_json(const CaseResult& c, bool with_samples) {
  Json json = {{"name", c.name}, {"backend", c.backend}, {"count", c.samples_ms.size()}};
  json.update(summary_json(c.samples_ms));
  json["item"] = c.item;
  json["items"] = c.items;
  const double p50 = json["p50_ms"].get<double>();
  json["items_per_second"] = rounded(p50 > 0 ? 1e3 * static_cast<double>(c.items) / p50 : 0);
  Json phases = Json::object();
  std::vector<double> explained(c.samples_ms.size());
  for (const CaseResult::Phase& phase : c.phases) {
    phases[phase.name] = summary_json(phase.ms);
    if (with_samples) phases[phase.name]["samples_ms"] = rounded_list(phase.ms);
    for (std::size_t i = 0; i < explained.size(); ++i) explained[i] += phase.ms[i];
  }
  double sum = 0, total = 0;
  for (std::size_t i = 0; i < explained.size(); ++i) {
    sum += explained[i];
    total += c.samples_ms[i];
  }
  json["phases"] = std::move(phases);
  json["explained_share"] = rounded(total > 0 ? sum / total : 0);
  json["calibration"] = {{"loop", c.calibration}};
  json["calibration"].update(summary_json(c.calibration_ms));
  json["calibration"]["p10_ms"] = rounded(summarize(c.calibration_ms).p10);
  if (with_samples) json["samples_ms"] = rounded_list(c.samples_ms);
  return json;
}

Json point_json(const SweepPoint& point) {
  Json json = {{"backend", point.backend},
               {"rtt_ms", rounded(point.rtt_ms)},
               {"bits_per_second", rounded(point.bits_per_second)},
               {"prompt_tokens", point.prompt_tokens},
               {"output_tokens", point.output_tokens},
               {"requests", point.ttft_ms.size()}};
  put_latency(json, "ttft", point.ttft_ms);
  put_latency(json, "tpot", point.tpot_ms);
  json["limit_ttft_ms"] = rounded(point.limit_ttft_ms);
  json["limit_tpot_ms"] = rounded(point.limit_tpot_ms);
  return json;
}

}  // namespace

Summary summarize(std::span<const double> samples) {
  Summary s;
  s.count = samples.size();
  if (samples.empty()) return s;
  std::vector<double> sorted(samples.begin(), samples.end());
  std::sort(sorted.begin(), sorted.end());
  const double n = static_cast<double>(sorted.size());
  s.mean = std::accumulate(sorted.begin(), sorted.end(), 0.0) / n;
  double squares = 0;
  for (double x : sorted) squares += (x - s.mean) * (x - s.mean);
  s.std = std::sqrt(squares / n);
  const auto percentile = [&](double p) {
    const double rank = p / 100 * (n - 1);
    const auto low = static_cast<std::size_t>(rank);
    const std::size_t high = std::min(low + 1, sorted.size() - 1);
    return sorted[low] + (rank - static_cast<double>(low)) * (sorted[high] - sorted[low]);
  };
  s.p10 = percentile(10);
  s.p50 = s.median = percentile(50);
  s.p90 = percentile(90);
  s.p95 = percentile(95);
  s.p99 = percentile(99);
  s.min = sorted.front();
  s.max = sorted.back();
  return s;
}

void ReportBuilder::add(const GenerateResult& result, std::size_t prompt_tokens, bool failed) {
  Request request{.result = result,
                  .prompt_tokens = prompt_tokens,
                  .output_tokens = result.tokens.size(),
                  .failed = failed};
  request.result.tokens.clear();
  requests_.push_back(std::move(request));
}

// Adds to `json` what the requests and the counters of one run say.
struct ReportWriter {
  static void put_run(Json& json, const ReportBuilder& builder, const RunFigures& figures,
                      double load_ms, const std::string& head_mode, bool with_samples);
  static Json samples(const ReportBuilder& builder);
};

Json ReportWriter::samples(const ReportBuilder& builder) {
  Json samples = Json::array();
  for (const auto& request : builder.requests_) {
    Json tokens = Json::array();
    for (const TokenTiming& timing : request.result.timings) tokens.push_back(token_json(timing));
    samples.push_back({{"prompt_tokens", request.prompt_tokens},
                       {"output_tokens", request.output_tokens},
                       {"failed", request.failed},
                       {"ttft_ms", rounded(request.result.ttft_ms)},
                       {"e2el_ms", rounded(request.result.e2el_ms)},
                       {"tokens_ms", std::move(tokens)}});
  }
  return samples;
}

void ReportWriter::put_run(Json& json, const ReportBuilder& builder, const RunFigures& figures,
                           double load_ms, const std::string& head_mode, bool with_samples) {
  std::vector<double> ttfts, tpots, itls, e2els;
  std::vector<TokenTiming> first, decode;
  std::size_t prompt_tokens = 0, output_tokens = 0, cached_rows = 0, failed = 0;
  std::uint64_t replayed_rows = 0, drafted = 0, accepted = 0;
  for (const auto& request : builder.requests_) {
    const auto& timings = request.result.timings;
    prompt_tokens += request.prompt_tokens;
    output_tokens += request.output_tokens;
    cached_rows += request.result.cached_rows;
    replayed_rows += request.result.replayed_rows;
    drafted += request.result.drafted;
    accepted += request.result.accepted;
    failed += request.failed;
    if (timings.empty()) continue;
    ttfts.push_back(request.result.ttft_ms);
    e2els.push_back(request.result.e2el_ms);
    first.push_back(timings.front());
    decode.insert(decode.end(), timings.begin() + 1, timings.end());
    for (auto t = timings.begin() + 1; t != timings.end(); ++t) itls.push_back(t->total_ms);
    if (timings.size() > 1) {
      tpots.push_back((request.result.e2el_ms - request.result.ttft_ms) /
                      static_cast<double>(timings.size() - 1));
    }
  }

  json["requests"] = {{"completed", builder.requests_.size() - failed}, {"failed", failed}};
  json["tokens"] = {{"prompt", prompt_tokens}, {"prompt_cached", cached_rows},
                    {"output", output_tokens}, {"replayed", replayed_rows},
                    {"drafted", drafted},      {"accepted", accepted}};
  json["duration_ms"] = rounded(figures.wall_ms);
  json["load_ms"] = rounded(load_ms);
  json["output_throughput"] =  // tokens a second
      rounded(figures.wall_ms > 0 ? 1e3 * static_cast<double>(output_tokens) / figures.wall_ms : 0);
  put_latency(json, "ttft", ttfts);
  put_latency(json, "tpot", tpots);
  put_latency(json, "itl", itls);
  put_latency(json, "e2el", e2els);
  json["phases"] = {{"first_token", phases_json(first)}, {"decode", phases_json(decode)}};

  const LinkCounters& link = figures.link;
  json["wire"] = {{"bytes_up", link.bytes_up},
                  {"bytes_down", link.bytes_down},
                  {"tensor_bytes_up", link.tensor_bytes_up},
                  {"tensor_bytes_down", link.tensor_bytes_down},
                  {"packed_bytes_up", link.packed_bytes_up},
                  {"packed_bytes_down", link.packed_bytes_down},
                  {"steps", link.steps},
                  {"handshakes", link.handshakes},
                  {"reconnects", link.reconnects}};
  const HeadCounters& head = figures.head;
  const auto a_token = [&](std::uint64_t count) {
    const auto tokens = static_cast<double>(head.tokens);
    return rounded(head.tokens > 0 ? static_cast<double>(count) / tokens : 0);
  };
  json["head"] = {{"mode", head_mode},
                  {"certified_tokens", head.tokens - head.full_passes - head.subset_hits},
                  {"rows_rescored", head.rows_rescored},
                  {"rows_rescored_per_token", a_token(head.rows_rescored)},
                  {"widenings", head.widenings},
                  {"full_passes", head.full_passes},
                  {"full_passes_per_token", a_token(head.full_passes)},
                  {"subset_hits", head.subset_hits},
                  {"subset_hits_per_token", a_token(head.subset_hits)}};
  json["memory"] = {{"peak_rss_bytes", peak_rss_bytes()},
                    {"device_peak_bytes", figures.client.device_peak_bytes},
                    {"client_weights_bytes", figures.client.weights_bytes},
                    {"embed_tokens_bytes", figures.memory.embed_tokens_bytes},
                    {"lm_head_bytes", figures.memory.lm_head_bytes},
                    {"head_copy_bytes", figures.client.head_copy_bytes},
                    {"cloak_bytes", figures.client.cloak_bytes},
                    {"body_weights_bytes", figures.memory.body_weights_bytes},
                    {"kv_bytes_per_token", figures.memory.kv_bytes_per_token},
                    {"kv_bytes", figures.peak_kv_positions * figures.memory.kv_bytes_per_token}};
  if (with_samples) json["samples"] = samples(builder);
}

std::string ReportBuilder::json(const RunDescription& run, const RunFigures& figures,
                                bool with_samples) const {
  Json json = head_json(run);
  ReportWriter::put_run(json, *this, figures, run.load_ms, run.head, with_samples);
  return json.dump(2) + "\n";
}

std::string bench_report_json(const RunDescription& description, std::span<const BenchRun> runs,
                              std::span<const CaseResult> cases, std::span<const SweepPoint> sweep,
                              bool with_samples) {
  Json json = head_json(description);
  Json runs_json = Json::array();
  for (const BenchRun& run : runs) {
    Json entry = {{"backend", run.backend}, {"backend_name", run.backend_name}};
    ReportWriter::put_run(entry, *run.requests, run.figures, run.load_ms, description.head,
                          with_samples);
    runs_json.push_back(std::move(entry));
  }
  json["runs"] = std::move(runs_json);
  Json cases_json = Json::array();
  for (const CaseResult& c : cases) cases_json.push_back(case_json(c, with_samples));
  json["cases"] = std::move(cases_json);
  if (!sweep.empty()) {
    Json sweep_json = Json::array();
    for (const SweepPoint& point : sweep) sweep_json.push_back(point_json(point));
    json["sweep"] = std::move(sweep_json);
  }
  return json.dump(2) + "\n";
}

double ReportBuilder::busy_ms() const {
  double ms = 0;
  for (const Request& request : requests_) ms += request.result.e2el_ms;
  return ms;
}

std::string ReportBuilder::phase_table() const {
  PhaseTimes first, decode;
  double first_total = 0, decode_total = 0;
  std::size_t n_first = 0, n_decode = 0;
  const auto accumulate = [](PhaseTimes& sum, const PhaseTimes& phases) {
    for (const PhaseName& phase : kPhases) sum.*phase.value += phases.*phase.value;
  };
  for (const Request& request : requests_) {
    const auto& timings = request.result.timings;
    for (std::size_t i = 0; i < timings.size(); ++i) {
      accumulate(i == 0 ? first : decode, timings[i].phases);
      (i == 0 ? first_total : decode_total) += timings[i].total_ms;
      ++(i == 0 ? n_first : n_decode);
    }
  }
  const double scale_first = n_first ? 1.0 / static_cast<double>(n_first) : 0;
  const double scale_decode = n_decode ? 1.0 / static_cast<double>(n_decode) : 0;
  std::string table =
      absl::StrFormat("%-10s %14s %14s %8s\n", "phase", "first (ms)", "decode (ms)", "share");
  const auto line = [&](const char* name, double a, double b) {
    absl::StrAppendFormat(&table, "%-10s %14.3f %14.3f %7.1f%%\n", name, a * scale_first,
                          b * scale_decode, decode_total > 0 ? 100 * b / decode_total : 0);
  };
  for (const PhaseName& phase : kPhases) line(phase.name, first.*phase.value, decode.*phase.value);
  line("explained", first.sum(), decode.sum());
  line("total", first_total, decode_total);
  return table;
}

}  // namespace infemeral
