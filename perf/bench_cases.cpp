#include "perf/bench_cases.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "cpu/body.h"
#include "engine/text.h"
#include "perf/case_recorder.h"
#include "perf/row_recorder.h"

namespace infemeral {
namespace {

constexpr int kLoadsPerRun = 8;
constexpr double kLoadMsPerRun = 500;

// Several passes: of a few dozen, the fastest tenth would be a matter of luck.
std::vector<double> calibrate(Calibrator& calibrator) {
  std::vector<double> passes(8);
  for (double& ms : passes) ms = calibrator.run(CalibrationLoop::kCompute);
  return passes;
}

absl::StatusOr<CaseResult> time_first_tokens(std::string name, std::string item,
                                             std::uint64_t items, ClientBackend& backend,
                                             Link& link, const BenchPlan& plan,
                                             Calibrator& calibrator,
                                             std::span<const std::vector<std::int32_t>> prompts) {
  CaseResult result = new_case(std::move(name), std::move(item), items, CalibrationLoop::kCompute);
  const auto status = repeat(plan, result.name, [&](bool measured) -> absl::Status {
    // The case before has filled the caches with its own data: a prompt that does not count brings
    // this one's back. Without it, a run's first sample takes up to twice as long as the others.
    GenerateResult uncounted;
    const auto warmed = generate_fresh(backend, link, plan, prompts.front(), 1, uncounted);
    if (!warmed.ok()) return warmed;
    for (const auto& prompt : prompts) {
      const std::vector<double> calibration_ms = calibrate(calibrator);
      GenerateResult generated;
      const auto made = generate_fresh(backend, link, plan, prompt, 1, generated);
      if (!made.ok()) return made;
      if (!measured) continue;
      append(result.calibration_ms, calibration_ms);
      add_sample(result, generated.ttft_ms, generated.timings.front().phases);
    }
    return absl::OkStatus();
  });
  if (!status.ok()) return status;
  return finished(std::move(result));
}

}  // namespace

absl::Status generate_fresh(ClientBackend& backend, Link& link, const BenchPlan& plan,
                            const std::vector<std::int32_t>& prompt, std::uint32_t max_tokens,
                            GenerateResult& result) {
  Pipeline pipeline(backend, link, {.wire = plan.wire, .max_context = plan.max_context});
  if (auto opened = pipeline.open(plan.stop); !opened.ok()) return opened.status();
  const auto status =
      pipeline.generate({.prompt = prompt, .max_tokens = max_tokens}, {}, plan.stop, result);
  if (!status.ok()) return status;
  if (result.tokens.size() != max_tokens) {
    return absl::InvalidArgumentError(cat("the model's context holds only ", result.tokens.size(),
                                          " of ", max_tokens,
                                          " tokens after a prompt; choose fewer"));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<std::vector<std::byte>>> record_rows(ClientBackend& backend, Link& link,
                                                                const BenchPlan& plan) {
  RowRecorder recorder(link);
  Pipeline pipeline(backend, recorder, {.wire = plan.wire, .max_context = plan.max_context});
  const auto generate_twice = [&](const std::vector<std::int32_t>& prompt,
                                  std::uint32_t max_tokens) -> absl::Status {
    GenerateResult first, second;
    for (GenerateResult* result : {&first, &second}) {
      const auto status =
          pipeline.generate({.prompt = prompt, .max_tokens = max_tokens}, {}, plan.stop, *result);
      if (!status.ok()) return status;
    }
    if (first.tokens != second.tokens) {
      return absl::InternalError(
          "the same prompt gave other tokens the second time; nothing was timed");
    }
    return absl::OkStatus();
  };
  for (const auto& prompt : plan.prompts) {
    if (auto status = generate_twice(prompt, plan.max_tokens); !status.ok()) return status;
  }
  if (auto status = generate_twice(plan.long_prompt, 1); !status.ok()) return status;
  return recorder.rows();
}

absl::Status check_backend(ClientBackend& backend, ClientBackend& reference,
                           std::span<const std::vector<std::byte>> rows, const BenchPlan& plan,
                           double tolerance) {
  const std::size_t hidden = reference.hidden_size();
  if (backend.hidden_size() != hidden || backend.vocab_size() != reference.vocab_size()) {
    return absl::InternalError("the backend and its reference have other sizes");
  }
  std::vector<float> logits(reference.vocab_size());
  std::vector<std::byte> ours(wire_row_bytes(plan.wire, hidden)), theirs(ours.size());
  std::vector<float> a(hidden), b(hidden);
  for (const auto& row : rows) {
    const SampleRequest request{};
    std::int32_t token = -1;
    PhaseTimes times;
    auto status = backend.next_tokens(row, plan.wire, {&request, 1}, {&token, 1}, times);
    if (!status.ok()) return status;
    if (status = reference.logits(row, plan.wire, logits); !status.ok()) return status;
    const auto [least, best] = std::minmax_element(logits.begin(), logits.end());
    const double largest = std::max(std::fabs(double{*least}), std::fabs(double{*best}));
    if (token < 0 || static_cast<std::size_t>(token) >= logits.size() ||
        double{logits[static_cast<std::size_t>(token)]} < *best - tolerance * largest) {
      return absl::InternalError(cat("on ", backend.name(),
                                     " a row gives another token than the full float16 head of the "
                                     "CPU; nothing was timed"));
    }

    for (auto [from, out] : {std::pair{&backend, &ours}, std::pair{&reference, &theirs}}) {
      if (status = from->embed({&token, 1}, plan.wire, *out, times); !status.ok()) return status;
    }
    decode_wire_row(plan.wire, ours.data(), a);
    decode_wire_row(plan.wire, theirs.data(), b);
    double difference = 0, norm = 0;
    for (std::size_t i = 0; i < hidden; ++i) {
      difference += (double{a[i]} - b[i]) * (double{a[i]} - b[i]);
      norm += double{b[i]} * b[i];
    }
    // Two roundings to the wire: 2^-11 each at f16, at most 2^-8 of the largest value at i8.
    const double rounding = plan.wire == WireDtype::kI8 ? 0x1p-5 : 0x1p-9;
    if (!(difference <= rounding * rounding * norm)) {
      return absl::InternalError(
          cat("on ", backend.name(), " a token's cloaked row is not the CPU's; nothing was timed"));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<CaseResult> time_ttft(ClientBackend& backend, Link& link, const BenchPlan& plan,
                                     Calibrator& calibrator) {
  return time_first_tokens("ttft", "token", 1, backend, link, plan, calibrator, plan.prompts);
}

absl::StatusOr<CaseResult> time_prefill(ClientBackend& backend, Link& link, const BenchPlan& plan,
                                        Calibrator& calibrator) {
  return time_first_tokens("prefill", "token", plan.long_prompt.size(), backend, link, plan,
                           calibrator, {&plan.long_prompt, 1});
}

absl::StatusOr<CaseResult> time_decode(ClientBackend& backend, Link& link, const BenchPlan& plan,
                                       Calibrator& calibrator, ReportBuilder* requests) {
  CaseResult result = new_case("decode", "token", 1, CalibrationLoop::kCompute);
  const auto status = repeat(plan, result.name, [&](bool measured) -> absl::Status {
    for (const auto& prompt : plan.prompts) {
      const std::vector<double> calibration_ms = calibrate(calibrator);
      GenerateResult generated;
      const auto made = generate_fresh(backend, link, plan, prompt, plan.max_tokens, generated);
      if (!made.ok()) return made;
      if (!measured) continue;
      append(result.calibration_ms, calibration_ms);
      for (std::size_t i = 1; i < generated.timings.size(); ++i) {
        add_sample(result, generated.timings[i].total_ms, generated.timings[i].phases);
      }
      if (requests != nullptr) requests->add(generated, prompt.size(), false);
    }
    return absl::OkStatus();
  });
  if (!status.ok()) return status;
  return finished(std::move(result));
}

absl::StatusOr<CaseResult> time_head(ClientBackend& backend,
                                     std::span<const std::vector<std::byte>> rows,
                                     const BenchPlan& plan, Calibrator& calibrator) {
  CaseResult result = new_case("head", "token", 1, CalibrationLoop::kCompute);
  std::vector<std::byte> out(wire_row_bytes(plan.wire, backend.hidden_size()));
  const auto status = repeat(plan, result.name, [&](bool measured) -> absl::Status {
    for (std::size_t i = 0; i < rows.size(); ++i) {
      // As often as tokens, a loop as long as a token's work would take half the time.
      if (i % 16 == 0) {
        const double calibration_ms = calibrator.run(CalibrationLoop::kCompute);
        if (measured) result.calibration_ms.push_back(calibration_ms);
      }
      const SampleRequest request{.position = i};
      std::int32_t token = -1;
      PhaseTimes times;
      const auto begin = BenchClock::now();
      auto made = backend.next_tokens(rows[i], plan.wire, {&request, 1}, {&token, 1}, times);
      if (made.ok()) made = backend.embed({&token, 1}, plan.wire, out, times);
      const double ms = ms_since(begin);
      if (!made.ok()) return made;
      if (measured) add_sample(result, ms, times);
    }
    return absl::OkStatus();
  });
  if (!status.ok()) return status;
  return finished(std::move(result));
}

absl::StatusOr<CaseResult> time_load(const std::filesystem::path& folder,
                                     const std::optional<std::filesystem::path>& body,
                                     const BackendOptions& options, const BenchPlan& plan,
                                     Calibrator& calibrator) {
  CaseResult result{.name = "load", .item = "load"};
  result.calibration = calibration_name(CalibrationLoop::kCompute);
  result.phases = {{.name = "open_folder"}, {.name = "open_backend"}, {.name = "make_cloak"}};
  if (body) result.phases.push_back({.name = "open_body"});
  const auto load_once = [&](bool measured) -> absl::Status {
    const double calibration_ms = calibrator.run(CalibrationLoop::kCompute);
    double laps[4] = {};
    const auto begin = BenchClock::now();
    PhaseClock clock;
    auto opened = ClientFolder::open(folder);
    if (!opened.ok()) return opened.status();
    clock.lap(laps[0]);
    auto backend = open_backend(*std::move(opened), options, {});
    if (!backend.ok()) return backend.status();
    clock.lap(laps[1]);
    std::vector<std::byte> row(wire_row_bytes(plan.wire, (*backend)->hidden_size()));
    const std::int32_t token = 0;
    PhaseTimes times;
    if (auto made = (*backend)->embed({&token, 1}, plan.wire, row, times); !made.ok()) return made;
    clock.lap(laps[2]);
    std::unique_ptr<Body> served;
    if (body) {
      auto loaded = load_cpu_body(*body, {.threads = options.threads});
      if (!loaded.ok()) return loaded.status();
      served = *std::move(loaded);
      clock.lap(laps[3]);
    }
    const double ms = ms_since(begin);
    if (!measured) return absl::OkStatus();
    result.calibration_ms.push_back(calibration_ms);
    result.samples_ms.push_back(ms);
    for (std::size_t i = 0; i < result.phases.size(); ++i) result.phases[i].ms.push_back(laps[i]);
    return absl::OkStatus();
  };
  // One load is a handful of system calls and page faults: of a few, a median says little. Large
  // models, whose loads take long, need no more than one a run.
  const auto status = repeat(plan, result.name, [&](bool measured) -> absl::Status {
    const auto begin = BenchClock::now();
    for (int i = 0; i < kLoadsPerRun && (i == 0 || ms_since(begin) < kLoadMsPerRun); ++i) {
      if (auto loaded = load_once(measured); !loaded.ok()) return loaded;
    }
    return absl::OkStatus();
  });
  if (!status.ok()) return status;
  return result;
}

}  // namespace infemeral
