// engine_bench without a model: the gate over planted slowdowns, a sweep's axes, exports of damaged
// reports. What other programs make of the exports is tests/reports/.
#include <catch2/catch.hpp>
#include <map>
#include <string>
#include <vector>

#include "perf/bench_export.h"
#include "perf/case_recorder.h"
#include "tests/bench_fixture.h"

namespace infemeral {
namespace {

using Phases = std::vector<std::pair<std::string, double>>;

// A case whose samples all take the sum of its phases.
CaseResult flat_case(const std::string& name, const Phases& phases, double calibration_ms = 1) {
  CaseResult result{.name = name, .backend = "cpu", .calibration = "compute-2"};
  double sum = 0;
  for (const auto& [phase, ms] : phases) {
    result.phases.push_back({phase, std::vector<double>(5, ms)});
    sum += ms;
  }
  result.samples_ms.assign(5, sum);
  result.calibration_ms.assign(5, calibration_ms);
  return result;
}

const Phases kPlain = {{"body", 80}, {"de_embed", 15}, {"network", 4.9}, {"sample", 0.1}};

// The other phases as they are, `name` times `factor`.
Phases with_factor(const std::string& name, double factor) {
  Phases phases = kPlain;
  for (auto& [phase, ms] : phases) {
    if (phase == name) ms *= factor;
  }
  return phases;
}

}  // namespace

TEST_CASE("the gate names the phase that became slower, and nothing when none did") {
  const Json baseline = report_of({flat_case("decode", kPlain), flat_case("head", kPlain)});
  CHECK(gate(baseline, baseline).regressions.empty());

  for (const char* phase : {"body", "de_embed"}) {
    CAPTURE(phase);
    const Json slow =
        report_of({flat_case("decode", with_factor(phase, 1.3)), flat_case("head", kPlain)});
    const GateResult result = gate(slow, baseline);
    REQUIRE(result.regressions.size() == 1);
    CHECK(result.regressions[0].name == "decode");
    CHECK(result.regressions[0].backend == "cpu");
    CHECK(result.regressions[0].phase == phase);
    CHECK(result.regressions[0].ratio == Approx(1.3));
    CHECK(result.table.find("SLOWER") != std::string::npos);
    CHECK(result.table.find(phase) != std::string::npos);
    // The other way round it is an improvement.
    CHECK(gate(baseline, slow).regressions.empty());
    // A looser gate lets it pass.
    CHECK(gate(slow, baseline, {.max_ratio = 1.4}).regressions.empty());
  }
  // 0.1 % of the case: tripled, it is still noise.
  CHECK(gate(report_of({flat_case("decode", with_factor("sample", 3))}), baseline)
            .regressions.empty());
  // What moved from one phase to another did not make the case slower.
  Phases moved = with_factor("de_embed", 1.5);
  moved[0].second -= 7.5;
  CHECK(gate(report_of({flat_case("decode", moved)}), baseline).regressions.empty());
  // Every phase a little: only the whole is beyond the limit of 1.2; the largest growth is named.
  Phases all = kPlain;
  for (auto& [name, ms] : all) ms *= name == "body" ? 1.2 : 1.19999;
  all.push_back({"encode", 1.5});
  const auto whole = gate(report_of({flat_case("decode", all)}), baseline).regressions;
  REQUIRE(whole.size() == 1);
  CHECK(whole[0].phase == "body");
  // Without phases there is still the case.
  const Json bare = report_of({flat_case("decode", {{"body", 130}})});
  Json no_phases = bare;
  no_phases["cases"][0]["phases"] = Json::object();
  const auto unnamed = gate(no_phases, report_of({flat_case("decode", {{"body", 100}})}));
  REQUIRE(unnamed.regressions.size() == 1);
  CHECK(unnamed.regressions[0].phase.empty());
}

TEST_CASE("the gate divides by the calibration: another machine is not a regression") {
  const Json baseline = report_of({flat_case("decode", kPlain, 2)});
  const auto elsewhere = [](const std::vector<CaseResult>& cases) {
    Json report = report_of(cases);
    report["environment"]["cpu"] = "another processor";
    return report;
  };
  Phases twice = kPlain;
  for (auto& [name, ms] : twice) ms *= 2;
  // Also where the same machine is busier.
  CHECK(gate(elsewhere({flat_case("decode", twice, 4)}), baseline).regressions.empty());
  CHECK(gate(report_of({flat_case("decode", twice, 4)}), baseline).regressions.empty());
  // The same times on a machine that is twice as fast are a regression, by the factor of two.
  const auto found = gate(elsewhere({flat_case("decode", kPlain, 1)}), baseline).regressions;
  REQUIRE(!found.empty());
  CHECK(found[0].ratio == Approx(2));
  CHECK(found[0].phase == "body");
  // On the same one it is the loop that has had a better hour.
  CHECK(gate(report_of({flat_case("decode", kPlain, 1)}), baseline).regressions.empty());
  const auto slow = gate(report_of({flat_case("decode", twice, 1)}), baseline).regressions;
  REQUIRE(!slow.empty());
  CHECK(slow[0].ratio == Approx(2));
  // A machine with another GPU is another machine.
  Json other_gpu = report_of({flat_case("decode", kPlain, 1)});
  other_gpu["environment"]["gpus"].push_back("another GPU");
  CHECK(!gate(other_gpu, baseline).regressions.empty());
}

TEST_CASE("the gate refuses to compare what cannot be compared") {
  const Json good = report_of({flat_case("decode", kPlain)});
  const auto refuses = [&](const Json& current, const Json& baseline, const char* why) {
    const auto result = compare_reports(current, baseline, {});
    CAPTURE(why, result.status().ToString());
    CHECK(absl::IsInvalidArgument(result.status()));
    CHECK(std::string(result.status().message()).find(why) != std::string::npos);
  };
  const auto changed = [&](const char* pointer, Json value) {
    Json report = good;
    report[Json::json_pointer(pointer)] = std::move(value);
    return report;
  };
  refuses(good, Json::array(), "not a report");
  refuses(Json(), good, "not a report");
  refuses(good, changed("/schema_version", 2), "not a report");
  refuses(good, changed("/cases", 7), "no cases");
  refuses(good, changed("/cases", Json::array()), "in common");
  refuses(good, changed("/cases/0/name", "prefill"), "in common");
  refuses(good, changed("/cases/0/backend", "cuda"), "in common");
  refuses(good, changed("/model/hidden_size", 9), "hidden_size");
  refuses(good, changed("/options/head", "full"), "head");
  refuses(good, changed("/options/prefill_tokens", 5), "prefill_tokens");
  refuses(good, changed("/cases/0/calibration/loop", "compute-0"), "calibrated");
  refuses(good, changed("/cases/0/calibration/p10_ms", 0), "calibration");
  refuses(good, changed("/cases/0/calibration", nullptr), "calibration");
  refuses(good, changed("/cases/0/p50_ms", "fast"), "p50_ms");
  refuses(changed("/cases/0/p50_ms", nullptr), good, "p50_ms");
  // Every value in turn becomes something else, on either side: an answer or a clean refusal.
  const Json leaves = good.flatten();
  for (const auto& [pointer, value] : leaves.items()) {
    for (const Json& odd : {Json(nullptr), Json::array({1}), Json("x"), Json(-1)}) {
      for (const auto& result : {compare_reports(changed(pointer.c_str(), odd), good, {}),
                                 compare_reports(good, changed(pointer.c_str(), odd), {})}) {
        CHECK((result.ok() || absl::IsInvalidArgument(result.status())));
      }
    }
  }
  // A case that the baseline lacks is said, not failed.
  const auto extra =
      gate(report_of({flat_case("decode", kPlain), flat_case("head", kPlain)}), good);
  CHECK(extra.regressions.empty());
  CHECK(extra.table.find("head/cpu") != std::string::npos);
}

TEST_CASE("runs of a case become one case, also where their phases differ") {
  CaseResult all;
  append_run(all, flat_case("decode", {{"body", 8}, {"decode", 1}}, 2));
  append_run(all, flat_case("decode", {{"encode", 3}, {"body", 4}}, 5));
  append_run(all, flat_case("decode", {{"body", 6}}, 7));
  CHECK(all.name == "decode");
  REQUIRE(all.samples_ms.size() == 15);
  CHECK(std::vector{all.samples_ms[4], all.samples_ms[5], all.samples_ms[14]} ==
        std::vector<double>{9, 7, 6});
  REQUIRE(all.calibration_ms.size() == 15);
  CHECK(all.calibration_ms[4] == 2);
  CHECK(all.calibration_ms[14] == 7);
  std::map<std::string, std::vector<double>> phases;
  for (const auto& phase : all.phases) {
    REQUIRE(phase.ms.size() == 15);
    phases[phase.name] = {phase.ms[0], phase.ms[9], phase.ms[10]};
  }
  CHECK(phases == std::map<std::string, std::vector<double>>{
                      {"body", {8, 4, 6}}, {"decode", {1, 0, 0}}, {"encode", {0, 3, 0}}});
}

TEST_CASE("a sweep's axes are read strictly") {
  const auto read = [](const std::vector<std::string>& words) { return parse_sweep(words); };
  const auto none = read({});
  REQUIRE(none.ok());
  CHECK(none->rtt_ms.empty());
  const auto both = read({"bandwidth=100k,2.5M,1G", "rtt=0,10,0.5"});
  REQUIRE(both.ok());
  CHECK(both->rtt_ms == std::vector<double>{0, 10, 0.5});
  CHECK(both->bits_per_second == std::vector<double>{1e5, 2.5e6, 1e9});
  CHECK(read({"rtt=20"})->bits_per_second == std::vector<double>{0});
  CHECK(read({"bandwidth=1M"})->rtt_ms == std::vector<double>{0});
  for (const char* bad : {"",
                          "rtt",
                          "rtt=",
                          "rtt=1,",
                          "rtt=,1",
                          "rtt=-1",
                          "rtt=1e3",
                          "rtt=1001",
                          "rtt=1M",
                          "rtt=x",
                          "rtt=nan",
                          "rtt=1.2.3",
                          "bandwidth=0",
                          "bandwidth=1",
                          "bandwidth=99k",
                          "bandwidth=1T",
                          "bandwidth=M",
                          "bandwidth=101G",
                          "bandwidth=inf",
                          "speed=1",
                          "=1"}) {
    CAPTURE(bad);
    CHECK(absl::IsInvalidArgument(read({bad}).status()));
  }
  CHECK(absl::IsInvalidArgument(read({"rtt=1", "rtt=2"}).status()));
  std::string long_axis = "rtt=0";
  for (int i = 0; i < 32; ++i) long_axis += ",1";
  CHECK(absl::IsInvalidArgument(read({long_axis}).status()));
}

TEST_CASE("an export of a damaged report is refused, wherever the damage is") {
  const SweepPoint point = {
      .backend = "cpu", .rtt_ms = 10, .bits_per_second = 1e8, .ttft_ms = {20}, .tpot_ms = {11}};
  const Json good = report_of({flat_case("decode", kPlain)}, true, {point});
  const Json leaves = good.flatten();
  CHECK(absl::IsInvalidArgument(export_report(good, "csv").status()));
  for (std::string_view format : kExportFormats) {
    CAPTURE(format);
    CHECK(export_report(good, format).ok());
    CHECK(absl::IsInvalidArgument(export_report(Json(), format).status()));
    CHECK(absl::IsInvalidArgument(export_report(Json{{"schema", "x"}}, format).status()));
    // Every value in turn becomes something else: a clean export or a clean refusal.
    std::size_t refused = 0;
    for (const auto& [pointer, value] : leaves.items()) {
      Json damaged = good;
      damaged[Json::json_pointer(pointer)] = Json::array({nullptr});
      const auto result = export_report(damaged, format);
      if (!result.ok()) {
        CHECK(absl::IsInvalidArgument(result.status()));
        ++refused;
      }
    }
    CHECK(refused > 0);
  }
}

}  // namespace infemeral
