#include "engine/report.h"

#include <catch2/catch.hpp>
#include <cmath>
#include <nlohmann/json.hpp>
#include <random>

namespace infemeral {

TEST_CASE("summaries equal numpy's") {
  // numpy.percentile([3, 1, 4, 1, 5, 9, 2, 6], [10, 50, 90, 95, 99]), mean, std
  const std::vector<double> samples = {3, 1, 4, 1, 5, 9, 2, 6};
  const Summary s = summarize(samples);
  CHECK(s.count == 8);
  CHECK(s.mean == Approx(3.875));
  CHECK(s.std == Approx(2.5708704751503917));
  CHECK(s.median == Approx(3.5));
  CHECK(s.p90 == Approx(6.9));
  CHECK(s.p95 == Approx(7.95));
  CHECK(s.p99 == Approx(8.79));
  CHECK(s.max == 9);
  CHECK(s.min == 1);
  CHECK(s.p10 == Approx(1));
  CHECK(summarize({}).mean == 0);
  const std::vector<double> one = {2.5};
  CHECK(summarize(one).p99 == 2.5);
}

TEST_CASE("a report holds the run's numbers and nothing that is not finite") {
  GenerateResult result;
  result.tokens = {11, 12, 13};
  for (double total : {100.0, 10.0, 20.0}) {
    TokenTiming timing;
    timing.phases.body_ms = 0.75 * total;
    timing.phases.network_ms = 0.125 * total;
    timing.total_ms = total;
    result.timings.push_back(timing);
  }
  result.ttft_ms = 100;
  result.e2el_ms = 130;
  result.cached_rows = 2;
  result.replayed_rows = 9;
  result.drafted = 8;
  result.accepted = 5;

  ReportBuilder builder;
  builder.add(result, 7, false);
  builder.add({}, 5, true);
  const RunDescription run{
      .tool = "test", .model_type = "llama", .hidden_size = 8, .head = "certified", .wire = "f16"};
  const HeadCounters head{.tokens = 4, .rows_rescored = 30, .widenings = 2, .full_passes = 1};
  const std::string text = builder.json(
      run,
      {.link = {.bytes_up = 123, .packed_bytes_up = 100, .handshakes = 5, .reconnects = 3},
       .client = {.weights_bytes = 4, .head_copy_bytes = 3},
       .head = head,
       .memory = {.kv_bytes_per_token = 5},
       .peak_kv_positions = 9,
       .wall_ms = 260},
      true);
  const auto json = nlohmann::json::parse(text);
  CHECK(json["schema_version"] == 1);
  CHECK(json["requests"]["completed"] == 1);
  CHECK(json["requests"]["failed"] == 1);
  CHECK(json["tokens"]["prompt"] == 12);
  CHECK(json["tokens"]["prompt_cached"] == 2);
  CHECK(json["tokens"]["output"] == 3);
  CHECK(json["tokens"]["replayed"] == 9);
  CHECK(json["tokens"]["drafted"] == 8);
  CHECK(json["tokens"]["accepted"] == 5);
  CHECK(json["wire"]["reconnects"] == 3);
  CHECK(json["mean_ttft_ms"] == Approx(100));
  CHECK(json["mean_tpot_ms"] == Approx(15));
  CHECK(json["p50_itl_ms"] == Approx(15));
  CHECK(json["p99_e2el_ms"] == Approx(130));
  CHECK(json["output_throughput"] == Approx(3 / 0.26));
  CHECK(json["phases"]["decode"]["body"]["mean_ms"] == Approx(11.25));
  CHECK(json["phases"]["decode"]["explained_share"] == Approx(0.875));
  CHECK(json["phases"]["decode"]["min_explained_share"] == Approx(0.875));
  CHECK(json["options"]["head"] == "certified");
  CHECK(json["wire"]["bytes_up"] == 123);
  CHECK(json["wire"]["packed_bytes_up"] == 100);
  CHECK(json["memory"]["head_copy_bytes"] == 3);
  CHECK(json["memory"]["kv_bytes"] == 5 * 9);
  CHECK(json["head"]["mode"] == "certified");
  CHECK(json["head"]["certified_tokens"] == 3);
  CHECK(json["head"]["rows_rescored_per_token"] == Approx(7.5));
  CHECK(json["head"]["widenings"] == 2);
  CHECK(json["head"]["full_passes_per_token"] == Approx(0.25));
  CHECK(json["head"]["subset_hits"] == 0);
  CHECK(json["memory"]["peak_rss_bytes"] > 0);
  CHECK(json["samples"].size() == 2);
  CHECK(json["samples"][0]["tokens_ms"][1]["body"] == Approx(7.5));
  CHECK(text.find("null") == std::string::npos);  // how JSON would show NaN

  // Nothing that the subset head accepts is certified.
  const HeadCounters subset{.tokens = 5, .full_passes = 2, .subset_hits = 3};
  const auto guessed =
      nlohmann::json::parse(ReportBuilder().json(run, {.head = subset, .wall_ms = 1}, false));
  CHECK(guessed["head"]["certified_tokens"] == 0);
  CHECK(guessed["head"]["subset_hits"] == 3);
  CHECK(guessed["head"]["subset_hits_per_token"] == Approx(0.6));
  CHECK(guessed["head"]["full_passes_per_token"] == Approx(0.4));

  const std::string empty = ReportBuilder().json(run, {}, false);
  CHECK(empty.find("null") == std::string::npos);
  CHECK(nlohmann::json::parse(empty)["mean_ttft_ms"] == 0);
}

TEST_CASE("a bench report holds a run for each backend and its cases") {
  ReportBuilder empty;
  GenerateResult result;
  result.timings = {{.total_ms = 4}, {.total_ms = 2}};
  result.ttft_ms = 4;
  result.e2el_ms = 6;
  ReportBuilder builder;
  builder.add(result, 3, false);
  const std::vector<BenchRun> runs = {
      {.backend = "cpu", .backend_name = "cpu (x)", .load_ms = 7, .requests = &builder},
      {.backend = "cuda", .backend_name = "cuda (y)", .requests = &empty}};
  const std::vector<CaseResult> cases = {{.name = "decode",
                                          .backend = "cpu",
                                          .samples_ms = {1, 3, NAN},
                                          .phases = {{"body", {0.5, 2.5, 1}}},
                                          .item = "token",
                                          .items = 1,
                                          .calibration = "compute",
                                          .calibration_ms = {2, 2, 2}},
                                         {.name = "codec", .backend = "none"}};
  const RunDescription description{.tool = "t", .bench_options = {{"runs", 3}}};
  for (bool samples : {false, true}) {
    const std::string text = bench_report_json(description, runs, cases, {}, samples);
    const auto json = nlohmann::json::parse(text);
    CHECK(json["options"]["runs"] == 3);
    CHECK(json["runs"].size() == 2);
    CHECK(json["runs"][0]["mean_tpot_ms"] == Approx(2));
    CHECK(json["runs"][0]["load_ms"] == Approx(7));
    CHECK(json["runs"][1]["backend_name"] == "cuda (y)");
    CHECK(json["cases"][0]["count"] == 3);
    CHECK(json["cases"][0]["phases"]["body"]["p50_ms"] == Approx(1));
    CHECK(json["cases"][0]["calibration"]["p10_ms"] == Approx(2));
    CHECK(json["cases"][0].contains("samples_ms") == samples);
    CHECK(json["runs"][0].contains("samples") == samples);
    CHECK(json["cases"][1]["p50_ms"] == 0);
    CHECK(text.find("null") == std::string::npos);
  }
}

TEST_CASE("the phase table names every phase and the share that they explain") {
  ReportBuilder builder;
  const std::string table = builder.phase_table();
  for (const char* name : {"embed", "cloak", "encode", "encrypt", "network", "body", "decrypt",
                           "decode", "uncloak", "de_embed", "sample", "explained", "total"}) {
    CHECK(table.find(name) != std::string::npos);
  }
}

}  // namespace infemeral
