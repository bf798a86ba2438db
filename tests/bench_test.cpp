// engine_bench over a whole private stack: its cases and its sweep, its checks over planted
// mistakes, and its gate over a planted slowdown.
#include <algorithm>
#include <catch2/catch.hpp>
#include <iostream>
#include <map>
#include <nlohmann/json.hpp>

#include "cpu/body.h"
#include "cpu/client_backend.h"
#include "cpu/prepare.h"
#include "perf/bench_cases.h"
#include "perf/line_sweep.h"
#include "tests/bench_fixture.h"
#include "tests/private_stack.h"
#include "tests/test_random.h"
#include "tests/tiny_model.h"
#include "tools/backend_select.h"

namespace infemeral {
namespace {

// A small model whose phases are all long enough to be seen.
struct Stack {
  Stack() {
    // A body and a head that take about as long: a slowdown of either is felt in a token.
    const TinyModelOptions model = {.hidden = 256,
                                    .layers = 6,
                                    .intermediate = 1024,
                                    .vocab = 12000,
                                    .tied = true,
                                    .dtype = Dtype::kF16,
                                    .seed = rng()()};
    make_tiny_model(temp.path() / "model", model);
    const auto prepared = prepare_model({.model_dir = temp.path() / "model",
                                         .output_dir = temp.path() / "out",
                                         .body_dtype = Dtype::kF16});
    INFO(prepared.status().ToString());
    REQUIRE(prepared.ok());
    parts.emplace(temp.path() / "out");
    const auto random_ids = [&](std::size_t n) {
      std::vector<std::int32_t> ids(n);
      for (auto& id : ids) id = static_cast<std::int32_t>(random_index(model.vocab));
      return ids;
    };
    for (std::size_t length : {1u, 5u, 9u}) plan.prompts.push_back(random_ids(length));
    plan.long_prompt = random_ids(40);
    plan.max_tokens = 12;
    plan.warmups = 1;
    plan.runs = 2;
  }

  ClientBackend& backend() { return *parts->backend; }
  Link& link() { return *parts->link; }
  std::unique_ptr<ClientBackend> reference() { return another({.head = HeadMode::kFull}); }
  std::unique_ptr<ClientBackend> another(const CpuOptions& options) {
    auto folder = ClientFolder::open(temp.path() / "out" / "client");
    REQUIRE(folder.ok());
    auto opened = make_cpu_client_backend(*std::move(folder), options);
    REQUIRE(opened.ok());
    return *std::move(opened);
  }

  TempFolder temp;
  std::optional<PrivateStack> parts;
  BenchPlan plan;
  Calibrator calibrator{0};
};

// Works for `ms` or, where the system takes the processor away, longer; adds what it took to
// `phase_ms` and returns it.
double slow_down(double ms, double& phase_ms) {
  PhaseClock clock;
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double, std::milli>(ms);
  while (std::chrono::steady_clock::now() < end) {
  }
  double took = 0;
  clock.lap(took);
  phase_ms += took;
  return took;
}

// Passes on to another backend, and can be made slow or wrong.
class WrappedBackend final : public ClientBackend {
 public:
  explicit WrappedBackend(ClientBackend& inner) : inner_(inner) {}

  double slow_share = 0;           // of de_embed, added to it
  std::vector<double> planted_ms;  // what every call became longer by
  std::int32_t token_offset = 0;
  bool alternate = false;  // the offset applies to every other call
  float row_error = 0;     // added to the first element of an embedded f16 row

  std::string_view name() const override { return "wrapped"; }
  std::size_t hidden_size() const override { return inner_.hidden_size(); }
  std::size_t vocab_size() const override { return inner_.vocab_size(); }
  MemoryUse memory() const override { return inner_.memory(); }

  absl::Status embed(std::span<const std::int32_t> ids, WireDtype dtype, std::span<std::byte> out,
                     PhaseTimes& times) override {
    const auto status = inner_.embed(ids, dtype, out, times);
    if (status.ok() && row_error != 0) {
      std::vector<float> row(hidden_size());
      decode_wire_row(dtype, out.data(), row);
      row[0] += row_error;
      encode_wire_row(dtype, row, out.data());
    }
    return status;
  }
  absl::Status next_tokens(std::span<const std::byte> rows, WireDtype dtype,
                           std::span<const SampleRequest> requests, std::span<std::int32_t> tokens,
                           PhaseTimes& times) override {
    const double before = times.de_embed_ms;
    const auto status = inner_.next_tokens(rows, dtype, requests, tokens, times);
    const double share_ms = slow_share * (times.de_embed_ms - before);
    planted_ms.push_back(slow_share > 0 ? slow_down(share_ms, times.de_embed_ms) : 0);
    ++calls_;
    if (!alternate || calls_ % 2 == 0) {
      const auto vocab = static_cast<std::int32_t>(vocab_size());
      for (auto& token : tokens) token = (token + token_offset) % vocab;
    }
    return status;
  }
  absl::Status logits(std::span<const std::byte> row, WireDtype dtype,
                      std::span<float> out) override {
    return inner_.logits(row, dtype, out);
  }

 private:
  ClientBackend& inner_;
  int calls_ = 0;
};

// The body in the caller's thread, without a network: what a token takes is work alone.
class DirectLink final : public Link {
 public:
  explicit DirectLink(Body& body) : body_(body) {}

  double slow_share = 0;           // of the body's time, added to it
  std::vector<double> planted_ms;  // what every step became longer by

  absl::StatusOr<SessionInfo> open_session(std::stop_token) override {
    auto opened = body_.new_session();
    if (!opened.ok()) return opened.status();
    session_ = *std::move(opened);
    return SessionInfo{.id = 1,
                       .hidden_size = body_.info().hidden_size,
                       .max_context = body_.info().max_context,
                       .max_rows = 256,
                       .body = body_.info().description};
  }
  absl::Status step(const StepRequest& request, std::stop_token, StepReply& reply,
                    PhaseTimes& times) override {
    PhaseClock clock;
    const std::size_t hidden = body_.info().hidden_size;
    const std::size_t row_bytes = wire_row_bytes(request.dtype, hidden);
    std::vector<float> states(request.rows * hidden);
    for (std::size_t i = 0; i < request.rows; ++i) {
      decode_wire_row(request.dtype, request.tensor.data() + i * row_bytes,
                      std::span(states).subspan(i * hidden, hidden));
    }
    reply.rows = output_rows(request.wanted, request.rows);
    std::vector<float> out(reply.rows * hidden);
    clock.lap(times.decode_ms);
    BodyStep step{.session = session_.get(),
                  .start_pos = request.start_pos,
                  .rows = request.rows,
                  .states = states,
                  .wanted = request.wanted,
                  .out = out,
                  .status = {}};
    double body_ms = 0;
    body_.run({&step, 1});
    clock.lap(body_ms);
    times.body_ms += body_ms;
    planted_ms.push_back(slow_share > 0 ? slow_down(slow_share * body_ms, times.body_ms) : 0);
    reply.kv_len = session_->kv_len();
    reply.tensor.resize(reply.rows * row_bytes);
    for (std::size_t i = 0; i < reply.rows; ++i) {
      encode_wire_row(request.dtype, std::span(out).subspan(i * hidden, hidden),
                      reply.tensor.data() + i * row_bytes);
    }
    return step.status;
  }
  void close_session(std::uint64_t) override { session_.reset(); }
  LinkCounters counters() const override { return {}; }
  std::string cipher() const override { return "none"; }

 private:
  Body& body_;
  std::unique_ptr<BodySession> session_;
};

// The run as it would have been without what was planted into one of its phases: the sample of
// every later token of a prompt, less what its call became longer by.
CaseResult without_planted(const CaseResult& slow, const std::string& phase,
                           const std::vector<double>& planted_ms, std::size_t tokens) {
  CaseResult plain = slow;
  REQUIRE(planted_ms.size() % tokens == 0);  // one call a token
  std::size_t sample = 0;
  for (std::size_t call = 0; call < planted_ms.size(); ++call) {
    if (call % tokens == 0) continue;  // a first token is not a sample
    REQUIRE(sample < plain.samples_ms.size());
    plain.samples_ms[sample] -= planted_ms[call];
    for (auto& p : plain.phases) {
      if (p.name == phase) p.ms[sample] -= planted_ms[call];
    }
    ++sample;
  }
  CHECK(sample == plain.samples_ms.size());
  return plain;
}

CaseResult checked(absl::StatusOr<CaseResult> result) {
  INFO(result.status().ToString());
  REQUIRE(result.ok());
  return *std::move(result);
}

}  // namespace

// Time is real, and what another program does to it must not matter. So one run is both sides: each
// of its tokens was slowed down by a measured time, and the baseline is the same tokens without it.
TEST_CASE("a slowdown of 30 % that is planted in one phase of a real run is found and named") {
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  Stack stack;
  stack.plan.runs = 3;
  stack.plan.warmups = 0;
  std::vector<double> rows_loaded;
  const auto client = stack.another({.threads = 1, .progress = [&](double done, double total) {
                                       CHECK(total == 12000);
                                       rows_loaded.push_back(done);
                                     }});
  CHECK(std::is_sorted(rows_loaded.begin(), rows_loaded.end()));
  REQUIRE(!rows_loaded.empty());
  CHECK(rows_loaded.back() == 12000);
  auto body = load_cpu_body(stack.temp.path() / "out" / "body", {.threads = 1});
  REQUIRE(body.ok());
  for (const char* name : {"de_embed", "body"}) {
    const std::string phase = name;
    CAPTURE(phase);
    WrappedBackend backend(*client);
    DirectLink link(**body);
    backend.slow_share = phase == "de_embed" ? 0.3 : 0;
    link.slow_share = phase == "body" ? 0.3 : 0;
    CaseResult slow = checked(time_decode(backend, link, stack.plan, stack.calibrator, nullptr));
    slow.backend = "cpu";
    const CaseResult plain = without_planted(
        slow, phase, phase == "body" ? link.planted_ms : backend.planted_ms, stack.plan.max_tokens);
    const GateResult result = gate(report_of({slow}), report_of({plain}));
    CAPTURE(result.table);
    REQUIRE(result.regressions.size() == 1);
    CHECK(result.regressions[0].name == "decode");
    CHECK(result.regressions[0].phase == phase);
    CHECK(result.regressions[0].ratio >= 1.3 - 1e-3);  // reports round to a nanosecond
    CHECK(gate(report_of({plain}), report_of({slow})).regressions.empty());
  }
}

TEST_CASE("wrong results are found before anything is timed") {
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  Stack stack;
  const auto reference = stack.reference();
  auto rows = record_rows(stack.backend(), stack.link(), stack.plan);
  INFO(rows.status().ToString());
  REQUIRE(rows.ok());
  CHECK(rows->size() >= stack.plan.prompts.size() * stack.plan.max_tokens);
  CHECK(check_backend(stack.backend(), *reference, *rows, stack.plan, 0).ok());

  WrappedBackend wrong(stack.backend());
  CHECK(check_backend(wrong, *reference, *rows, stack.plan, 0).ok());
  wrong.token_offset = 1;
  CHECK(absl::IsInternal(check_backend(wrong, *reference, *rows, stack.plan, 0x1p-10)));
  wrong.token_offset = 0;
  wrong.row_error = 0.1f;
  CHECK(absl::IsInternal(check_backend(wrong, *reference, *rows, stack.plan, 0)));

  WrappedBackend changing(stack.backend());
  changing.token_offset = 1;
  changing.alternate = true;
  stack.plan.max_tokens = 11;  // odd: the second time, other calls are changed
  const auto recorded = record_rows(changing, stack.link(), stack.plan);
  CHECK(absl::IsInternal(recorded.status()));
}

TEST_CASE("every case keeps a sample for each repetition, and its phases explain it") {
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  Stack stack;
  ReportBuilder requests;
  const auto rows = record_rows(stack.backend(), stack.link(), stack.plan);
  REQUIRE(rows.ok());
  const BenchPlan& plan = stack.plan;
  const std::size_t prompts = plan.prompts.size();
  std::map<std::string, std::pair<CaseResult, std::size_t>> cases;
  const auto add = [&](absl::StatusOr<CaseResult> result, std::size_t samples) {
    CaseResult c = checked(std::move(result));
    const std::string name = c.name;
    cases[name] = {std::move(c), samples};
  };
  Calibrator& calibrator = stack.calibrator;
  add(time_ttft(stack.backend(), stack.link(), plan, calibrator), 2 * prompts);
  add(time_decode(stack.backend(), stack.link(), plan, calibrator, &requests), 2 * prompts * 11);
  add(time_prefill(stack.backend(), stack.link(), plan, calibrator), 2);
  add(time_head(stack.backend(), *rows, plan, calibrator), 2 * rows->size());
  add(time_codec(256, plan, calibrator), 2 * 200);
  add(time_channel(256, plan, calibrator), 2 * 200);
  const auto out = stack.temp.path() / "out";
  add(time_load(out / "client", out / "body", {.name = "cpu"}, plan, calibrator), 2);
  CHECK(cases.size() == std::size(kCaseNames));

  std::vector<CaseResult> list;
  for (std::string_view name : kCaseNames) {
    const auto found = cases.find(std::string(name));
    CAPTURE(name);
    REQUIRE(found != cases.end());
    const CaseResult& c = found->second.first;
    const std::size_t expected = found->second.second;
    if (name == "load") {
      CHECK(c.samples_ms.size() >= expected);
    } else {
      CHECK(c.samples_ms.size() == expected);
    }
    const std::size_t samples = c.samples_ms.size();
    CHECK(!c.calibration_ms.empty());
    CHECK(!c.phases.empty());
    for (const auto& phase : c.phases) REQUIRE(phase.ms.size() == samples);
    // Where the system takes the processor away between two phases, that is nobody's time; it does
    // not happen to most samples.
    std::vector<double> shares;
    for (std::size_t i = 0; i < samples; ++i) {
      REQUIRE(c.samples_ms[i] > 0);
      double explained = 0;
      for (const auto& phase : c.phases) explained += phase.ms[i];
      CHECK(explained <= 1.001 * c.samples_ms[i]);
      shares.push_back(explained / c.samples_ms[i]);
    }
    std::sort(shares.begin(), shares.end());
    CHECK(shares[shares.size() / 2] >= 0.8);
    list.push_back(c);
  }
  CHECK(cases["prefill"].first.items == plan.long_prompt.size());
  const BenchRun run{.backend = "cpu", .backend_name = "x", .requests = &requests};
  const Json report = Json::parse(bench_report_json(kDescription, {&run, 1}, list, {}, true));
  CHECK(report["runs"][0]["requests"]["completed"] == 2 * prompts);
  CHECK(report["runs"][0]["tokens"]["output"] == 2 * prompts * 12);

  std::stop_source stopped;
  stopped.request_stop();
  stack.plan.stop = stopped.get_token();
  CHECK(absl::IsCancelled(time_codec(256, stack.plan, calibrator).status()));
  CHECK(
      absl::IsCancelled(time_ttft(stack.backend(), stack.link(), stack.plan, calibrator).status()));
}

TEST_CASE("a sweep measures every place of the line, none faster than the line is") {
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  Stack stack;
  stack.plan.max_tokens = 3;
  Endpoint& endpoint = *stack.parts->endpoint;
  const SweepRoute route = {
      .direct = &stack.link(), .server_port = endpoint.local_port(), .connect = [&](int port) {
        return endpoint.connect_through(port, {});
      }};
  const SweepAxes axes = {.rtt_ms = {0, 12}, .bits_per_second = {4e6, 0}};
  const auto points = time_sweep(stack.backend(), route, axes, stack.plan);
  INFO(points.status().ToString());
  REQUIRE(points.ok());
  REQUIRE(points->size() == 4);
  for (std::size_t i = 0; i < points->size(); ++i) {
    const SweepPoint& point = (*points)[i];
    CHECK(point.rtt_ms == axes.rtt_ms[i % 2]);
    CHECK(point.bits_per_second == axes.bits_per_second[i / 2]);
    CHECK(point.prompt_tokens == stack.plan.long_prompt.size());
    CHECK(point.output_tokens == 3);
    const double row_ms = i < 2 ? 1e3 * 256 * 16 / 4e6 : 0;  // 256 float16 elements
    // 40 rows up and one down, or one each way; LZ4 takes a little off.
    CHECK(point.limit_ttft_ms <= point.rtt_ms + 41 * row_ms + 1e-9);
    CHECK(point.limit_ttft_ms >= point.rtt_ms + 0.7 * 41 * row_ms);
    CHECK(point.limit_tpot_ms <= point.rtt_ms + 2 * row_ms + 1e-9);
    CHECK(point.limit_tpot_ms >= point.rtt_ms + 0.7 * 2 * row_ms);
    REQUIRE(point.ttft_ms.size() == 2);
    REQUIRE(point.tpot_ms.size() == 2);
    for (double ms : point.ttft_ms) CHECK(ms >= point.limit_ttft_ms);
    for (double ms : point.tpot_ms) CHECK(ms >= point.limit_tpot_ms);
  }

  WrappedBackend changing(stack.backend());
  changing.token_offset = 1;
  changing.alternate = true;
  CHECK(absl::IsInternal(time_sweep(changing, route, axes, stack.plan).status()));
}

void check_phases(ClientBackend& backend, Link& link,
                  const std::vector<std::vector<std::int32_t>>& prompts) {
  Pipeline pipeline(backend, link, {.prefill_rows = 4});
  for (const auto& prompt : prompts) {
    // Where the system takes the processor away between two phases, that is nobody's time. It does
    // not happen to the same token each time, so the same tokens are made until each was explained.
    std::vector<double> best(60, 0);
    const auto explained = [](double share) { return share >= 0.8; };
    for (int repeat = 0; repeat < 10; ++repeat) {
      if (std::all_of(best.begin(), best.end(), explained)) break;
      GenerateResult result;
      REQUIRE(pipeline
                  .generate({.prompt = prompt,
                             .max_tokens = static_cast<std::uint32_t>(best.size()),
                             .sampling = {.temperature = 1, .top_p = 0.9f}},
                            {}, {}, result)
                  .ok());
      REQUIRE(result.timings.size() == best.size());
      for (std::size_t i = 0; i < best.size(); ++i) {
        const TokenTiming& timing = result.timings[i];
        CHECK(timing.phases.sum() <= timing.total_ms * (1 + 1e-9));
        best[i] = std::max(best[i], timing.phases.sum() / timing.total_ms);
      }
    }
    for (double share : best) CHECK(explained(share));
  }
}

TEST_CASE("the phases explain at least 80 % of every token's time") {
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  Stack stack;
  check_phases(stack.backend(), stack.link(), stack.plan.prompts);
}

TEST_CASE("the phases explain at least 80 % of every token's time on a GPU") {
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  Stack stack;
  auto folder = ClientFolder::open(stack.temp.path() / "out" / "client");
  REQUIRE(folder.ok());
  const auto backend = open_backend(*std::move(folder), {.name = "cuda"}, {});
  if (absl::IsUnavailable(backend.status()) || absl::IsUnimplemented(backend.status())) {
    std::cout << "skipped: " << backend.status().message() << '\n';
    return;
  }
  INFO(backend.status().ToString());
  REQUIRE(backend.ok());
  check_phases(**backend, stack.link(), stack.plan.prompts);
}

}  // namespace infemeral
