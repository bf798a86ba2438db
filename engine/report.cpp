#include "engine/report.h"

#include <sys/utsname.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <ctime>
#include <fstream>
#include <nlohmann/json.hpp>
#include <numeric>
#include <thread>

#include "absl/strings/str_format.h"
#include "engine/text.h"
#include "engine/version.h"

namespace infemeral {
namespace {

using Json = nlohmann::ordered_json;

struct Phase {
  const char* name;
  double PhaseTimes::*value;
};
constexpr std::array<Phase, 11> kPhases = {{{"embed", &PhaseTimes::embed_ms},
                                            {"cloak", &PhaseTimes::cloak_ms},
                                            {"encode", &PhaseTimes::encode_ms},
                                            {"encrypt", &PhaseTimes::encrypt_ms},
                                            {"network", &PhaseTimes::network_ms},
                                            {"body", &PhaseTimes::body_ms},
                                            {"decrypt", &PhaseTimes::decrypt_ms},
                                            {"decode", &PhaseTimes::decode_ms},
                                            {"uncloak", &PhaseTimes::uncloak_ms},
                                            {"de_embed", &PhaseTimes::de_embed_ms},
                                            {"sample", &PhaseTimes::sample_ms}}};

double rounded(double ms) {
  return std::isfinite(ms) ? std::round(ms * 1e6) / 1e6 : 0;
}

std::string utc_now() {
  const std::time_t now = std::time(nullptr);
  std::tm utc{};
  gmtime_r(&now, &utc);
  char text[32];
  std::strftime(text, sizeof(text), "%Y-%m-%dT%H:%M:%SZ", &utc);
  return text;
}

std::string cpu_model() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with("model name")) {
      const auto colon = line.find(": ");
      if (colon != std::string::npos) return line.substr(colon + 2);
    }
  }
  return "unknown";
}

Json environment() {
  utsname system{};
  uname(&system);
  return {{"cpu", cpu_model()},
          {"logical_cores", std::thread::hardware_concurrency()},
          {"os", cat(system.sysname, " ", system.release)},
          {"machine", std::string(system.machine)}};
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
  for (const Phase& phase : kPhases) {
    std::transform(timings.begin(), timings.end(), samples.begin(),
                   [&](const TokenTiming& t) { return t.phases.*phase.value; });
    const Summary s = summarize(samples);
    json[phase.name] = {{"mean_ms", rounded(s.mean)},
                        {"p50_ms", rounded(s.p50)},
                        {"p95_ms", rounded(s.p95)},
                        {"p99_ms", rounded(s.p99)}};
  }
  double total = 0, explained = 0;
  for (const TokenTiming& t : timings) {
    total += t.total_ms;
    explained += t.phases.sum();
  }
  json["total"] = {
      {"mean_ms", rounded(timings.empty() ? 0 : total / static_cast<double>(timings.size()))}};
  json["explained_share"] = rounded(total > 0 ? explained / total : 0);
  return json;
}

Json token_json(const TokenTiming& timing) {
  Json json = Json::object();
  for (const Phase& phase : kPhases) json[phase.name] = rounded(timing.phases.*phase.value);
  json["total"] = rounded(timing.total_ms);
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
  s.p50 = s.median = percentile(50);
  s.p90 = percentile(90);
  s.p95 = percentile(95);
  s.p99 = percentile(99);
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

std::string ReportBuilder::json(const RunDescription& run, const LinkCounters& link,
                                const MemoryUse& client, const HeadCounters& head, double wall_ms,
                                bool with_samples) const {
  std::vector<double> ttfts, tpots, itls, e2els;
  std::vector<TokenTiming> first, decode;
  std::size_t prompt_tokens = 0, output_tokens = 0, cached_rows = 0, failed = 0;
  for (const Request& request : requests_) {
    const auto& timings = request.result.timings;
    prompt_tokens += request.prompt_tokens;
    output_tokens += request.output_tokens;
    cached_rows += request.result.cached_rows;
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

  Json json;
  json["schema"] = "infemeral-report";
  json["schema_version"] = 1;
  json["created"] = utc_now();
  json["tool"] = run.tool;
  json["build"] = {{"version", std::string(kVersion)},
                   {"git_revision", std::string(kGitRevision)},
                   {"build_type", std::string(kBuildType)},
                   {"compiler", std::string(kCompiler)}};
  json["environment"] = environment();
  json["model"] = {{"type", run.model_type},
                   {"hidden_size", run.hidden_size},
                   {"vocab_size", run.vocab_size},
                   {"tied_embeddings", run.tied_embeddings},
                   {"body", run.body}};
  json["options"] = {{"backend", run.backend}, {"server", run.server},
                     {"wire", run.wire},       {"cipher", run.cipher},
                     {"threads", run.threads}, {"max_tokens", run.max_tokens}};
  json["requests"] = {{"completed", requests_.size() - failed}, {"failed", failed}};
  json["tokens"] = {
      {"prompt", prompt_tokens}, {"prompt_cached", cached_rows}, {"output", output_tokens}};
  json["duration_ms"] = rounded(wall_ms);
  json["load_ms"] = rounded(run.load_ms);
  json["output_throughput"] =  // tokens a second
      rounded(wall_ms > 0 ? 1e3 * static_cast<double>(output_tokens) / wall_ms : 0);
  put_latency(json, "ttft", ttfts);
  put_latency(json, "tpot", tpots);
  put_latency(json, "itl", itls);
  put_latency(json, "e2el", e2els);
  json["phases"] = {{"first_token", phases_json(first)}, {"decode", phases_json(decode)}};
  json["wire"] = {{"bytes_up", link.bytes_up},
                  {"bytes_down", link.bytes_down},
                  {"tensor_bytes_up", link.tensor_bytes_up},
                  {"tensor_bytes_down", link.tensor_bytes_down},
                  {"steps", link.steps},
                  {"handshakes", link.handshakes}};
  const auto a_token = [&](std::uint64_t count) {
    const auto tokens = static_cast<double>(head.tokens);
    return rounded(head.tokens > 0 ? static_cast<double>(count) / tokens : 0);
  };
  json["head"] = {{"mode", run.head},
                  {"certified_tokens", head.tokens - head.full_passes - head.subset_hits},
                  {"rows_rescored", head.rows_rescored},
                  {"rows_rescored_per_token", a_token(head.rows_rescored)},
                  {"widenings", head.widenings},
                  {"full_passes", head.full_passes},
                  {"full_passes_per_token", a_token(head.full_passes)},
                  {"subset_hits", head.subset_hits},
                  {"subset_hits_per_token", a_token(head.subset_hits)}};
  json["memory"] = {{"peak_rss_bytes", peak_rss_bytes()},
                    {"client_weights_bytes", client.weights_bytes},
                    {"cloak_bytes", client.cloak_bytes},
                    {"device_peak_bytes", client.device_peak_bytes}};
  if (with_samples) {
    Json samples = Json::array();
    for (const Request& request : requests_) {
      Json tokens = Json::array();
      for (const TokenTiming& timing : request.result.timings) tokens.push_back(token_json(timing));
      samples.push_back({{"prompt_tokens", request.prompt_tokens},
                         {"output_tokens", request.output_tokens},
                         {"failed", request.failed},
                         {"ttft_ms", rounded(request.result.ttft_ms)},
                         {"e2el_ms", rounded(request.result.e2el_ms)},
                         {"tokens_ms", std::move(tokens)}});
    }
    json["samples"] = std::move(samples);
  }
  return json.dump(2) + "\n";
}

std::string ReportBuilder::phase_table() const {
  PhaseTimes first, decode;
  double first_total = 0, decode_total = 0;
  std::size_t n_first = 0, n_decode = 0;
  const auto accumulate = [](PhaseTimes& sum, const PhaseTimes& phases) {
    for (const Phase& phase : kPhases) sum.*phase.value += phases.*phase.value;
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
  for (const Phase& phase : kPhases) line(phase.name, first.*phase.value, decode.*phase.value);
  line("explained", first.sum(), decode.sum());
  line("total", first_total, decode_total);
  return table;
}

}  // namespace infemeral
