#include "perf/bench_suite.h"

#include <algorithm>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "engine/report.h"
#include "engine/text.h"
#include "engine/text_generation.h"
#include "net/library_versions.h"
#include "perf/bench_cases.h"
#include "perf/bench_prompts.h"
#include "perf/case_recorder.h"
#include "perf/line_sweep.h"
#include "tools/backend_select.h"
#include "tools/cli.h"
#include "tools/endpoint.h"
#include "tools/progress.h"
#include "tools/run_memory.h"

namespace infemeral {
namespace {

// One backend, open, with what its run gathered.
struct Subject {
  std::string kind;  // "cpu", "cuda"
  std::unique_ptr<ClientBackend> backend;
  double load_ms = 0;
  std::unique_ptr<ReportBuilder> requests = std::make_unique<ReportBuilder>();
  std::unique_ptr<Link> link;
  std::vector<std::vector<std::byte>> rows;  // that its body returned
};

// A case of one backend, or of none.
struct Timing {
  std::string backend, name;
  std::function<absl::StatusOr<CaseResult>(const BenchPlan&)> run;
};

class Bench {
 public:
  Bench(const BenchOptions& options, const Console& console, std::stop_token stop)
      : options_(options), console_(console), progress_(console.progress_enabled()) {
    plan_.stop = std::move(stop);
    plan_.warmups = options.warmups;
    plan_.runs = options.runs;
    plan_.max_tokens = options.max_tokens;
  }

  // The report as JSON text.
  absl::StatusOr<std::string> operator()() {
    if (auto status = open(); !status.ok()) return status;
    read_speed_ = read_bytes_per_second(options_.threads, token_bytes());
    Calibrator calibrator(options_.threads);
    std::vector<Timing> timings;
    for (Subject& subject : subjects_) {
      stage_ = subject.kind;
      if (auto status = get_ready(subject); !status.ok()) return status;
      add_timings(subject, calibrator, timings);
    }
    const std::size_t hidden_size = manifest_.hidden_size;
    timings.push_back({"none", "codec", [&](const BenchPlan& plan) {
                         return time_codec(hidden_size, plan, calibrator);
                       }});
    timings.push_back({"none", "channel", [&](const BenchPlan& plan) {
                         return time_channel(hidden_size, plan, calibrator);
                       }});
    std::erase_if(timings, [&](const Timing& timing) { return !wanted(timing.name); });
    if (auto status = measure(timings); !status.ok()) return status;
    for (Subject& subject : subjects_) {
      stage_ = subject.kind;
      if (auto status = sweep(subject); !status.ok()) return status;
    }
    progress_.clear();
    return report();
  }

 private:
  bool wanted(std::string_view name) const {
    return options_.cases.empty() ||
           std::find(options_.cases.begin(), options_.cases.end(), name) != options_.cases.end();
  }
  bool generates() const {
    return wanted("ttft") || wanted("decode") || wanted("prefill") || wanted("head") ||
           !sweep_.rtt_ms.empty();
  }

  BackendOptions backend_options(const std::string& kind) const {
    return {.name = kind,
            .threads = options_.threads,
            .head = *head_,
            .gpu_memory = options_.gpu_memory};
  }

  absl::StatusOr<std::unique_ptr<ClientBackend>> open_client(const BackendOptions& options) {
    auto folder = ClientFolder::open(folder_);
    if (!folder.ok()) return folder.status();
    return open_backend(*std::move(folder), options, console_.sink());
  }

  absl::Status open() {
    const auto wire = parse_wire_dtype(options_.wire);
    if (!wire) return absl::InvalidArgumentError("--wire takes f32, f16 or i8");
    plan_.wire = *wire;
    auto sweep = parse_sweep(options_.sweep);
    if (!sweep.ok()) return sweep.status();
    sweep_ = *std::move(sweep);
    if (!options_.sweep.empty() && options_.server != "local") {
      return absl::InvalidArgumentError(
          "--sweep goes through a relay on this machine and needs --server local");
    }
    head_ = parse_head_mode(options_.head);
    if (!head_) return absl::InvalidArgumentError("--head takes certified, full, int8 or subset");
    plan_.progress = [this](std::string_view stage, double done, double total) {
      progress_.update(stage_.empty() ? std::string(stage) : cat(stage_, " ", stage), done, total);
    };
    folder_ = client_folder(options_.model);
    auto folder = ClientFolder::open(folder_);
    if (!folder.ok()) return folder.status();
    manifest_ = folder->manifest;
    memory_ = table_memory(*folder);
    plan_.max_context = manifest_.max_context;
    if (auto status = make_prompts(); !status.ok()) return status;

    for (const char* kind : {"cpu", "cuda"}) {
      if (options_.backend != "auto" && options_.backend != kind) continue;
      const auto begin = BenchClock::now();
      stage_ = kind;
      BackendOptions load = backend_options(kind);
      load.progress = [this](double done, double total) { plan_.progress("load", done, total); };
      auto backend = open_client(load);
      const bool absent =
          absl::IsUnimplemented(backend.status()) || absl::IsUnavailable(backend.status());
      if (absent && options_.backend == "auto") continue;
      if (!backend.ok()) return backend.status();
      subjects_.push_back({.kind = kind, .backend = *std::move(backend)});
      subjects_.back().load_ms = ms_since(begin);
    }
    auto endpoint = Endpoint::open({.server = options_.server,
                                    .server_key = options_.server_key,
                                    .identity = options_.identity,
                                    .body_folder = body_folder(folder_),
                                    .threads = options_.threads,
                                    .log = console_.sink()},
                                   manifest_);
    if (!endpoint.ok()) return endpoint.status();
    endpoint_ = *std::move(endpoint);
    put_body_memory(*endpoint_, body_folder(folder_), memory_);
    return absl::OkStatus();
  }

  // About what a token's weights take, so that a cache that holds these holds the buffer too.
  std::size_t token_bytes() const {
    std::size_t bytes = memory_.body_weights_bytes;
    if (!subjects_.empty()) bytes += subjects_.front().backend->memory().head_copy_bytes;
    return std::clamp(bytes, std::size_t{64} << 20, std::size_t{1} << 30);
  }

  absl::Status make_prompts() {
    auto assets = TextAssets::load(folder_);
    if (!assets.ok()) return assets.status();
    for (std::string_view prompt : kPrompts) {
      auto ids = assets->encode_prompt(prompt);
      if (!ids.ok()) return ids.status();
      if (ids->size() < kPromptTokens) {
        return absl::InvalidArgumentError(cat("the tokenizer makes ", ids->size(),
                                              " tokens of a prompt; the benchmark needs ",
                                              kPromptTokens));
      }
      ids->resize(kPromptTokens);
      plan_.prompts.push_back(*std::move(ids));
    }
    std::string text;
    while (plan_.long_prompt.size() < options_.prefill_tokens) {
      // A token stands for at least a byte of what was added.
      text += kLongPrompt;
      auto ids = assets->encode_prompt(text);
      if (!ids.ok()) return ids.status();
      if (ids->size() <= plan_.long_prompt.size()) {
        return absl::InvalidArgumentError("the tokenizer makes no tokens of the benchmark's text");
      }
      plan_.long_prompt = *std::move(ids);
    }
    plan_.long_prompt.resize(options_.prefill_tokens);
    return absl::OkStatus();
  }

  // Connects, and checks what it will be timed for.
  absl::Status get_ready(Subject& subject) {
    auto link = endpoint_->connect(plan_.stop);
    if (!link.ok()) return link.status();
    subject.link = *std::move(link);

    // The session tells what the body is, and that it belongs to this client.
    auto session = subject.link->open_session(plan_.stop);
    if (!session.ok()) return session.status();
    body_ = session->body;
    cipher_ = subject.link->cipher();
    subject.link->close_session(session->id);

    if (!generates()) return absl::OkStatus();
    plan_.progress("check", 0, 1);
    auto recorded = record_rows(*subject.backend, *subject.link, plan_);
    if (!recorded.ok()) return recorded.status();
    subject.rows = *std::move(recorded);
    return check(subject, subject.rows);
  }

  void add_timings(Subject& subject, Calibrator& calibrator, std::vector<Timing>& timings) const {
    const auto add = [&](std::string name, auto run) {
      timings.push_back({subject.kind, std::move(name), std::move(run)});
    };
    add("ttft", [&](const BenchPlan& plan) {
      return time_ttft(*subject.backend, *subject.link, plan, calibrator);
    });
    add("decode", [&](const BenchPlan& plan) {
      return time_decode(*subject.backend, *subject.link, plan, calibrator, subject.requests.get());
    });
    add("prefill", [&](const BenchPlan& plan) {
      return time_prefill(*subject.backend, *subject.link, plan, calibrator);
    });
    add("head", [&](const BenchPlan& plan) {
      return time_head(*subject.backend, subject.rows, plan, calibrator);
    });
    add("load", [&](const BenchPlan& plan) {
      std::optional<std::filesystem::path> body;
      if (options_.server == "local") body = body_folder(folder_);
      return time_load(folder_, body, backend_options(subject.kind), plan, calibrator);
    });
  }

  // A run of every case, and then the next one: a machine's slower seconds fall on all of them, and
  // a short case is measured over as long a time as a long one.
  absl::Status measure(std::span<const Timing> timings) {
    BenchPlan plan = plan_;
    plan.runs = 1;
    const auto steps = static_cast<double>(timings.size()) * plan_.runs;
    plan.progress = {};
    cases_.resize(timings.size());
    for (int run = 0; run < plan_.runs; ++run) {
      plan.warmups = run == 0 ? plan_.warmups : 0;
      for (std::size_t i = 0; i < timings.size(); ++i) {
        stage_ = timings[i].backend == "none" ? "" : timings[i].backend;
        plan_.progress(timings[i].name,
                       run * static_cast<double>(timings.size()) + static_cast<double>(i), steps);
        auto result = timings[i].run(plan);
        if (!result.ok()) return result.status();
        result->backend = timings[i].backend;
        append_run(cases_[i], *std::move(result));
      }
    }
    return absl::OkStatus();
  }

  absl::Status sweep(Subject& subject) {
    if (sweep_.rtt_ms.empty()) return absl::OkStatus();
    auto points = time_sweep(
        *subject.backend,
        {.direct = subject.link.get(),
         .server_port = endpoint_->local_port(),
         .connect = [&](int port) { return endpoint_->connect_through(port, plan_.stop); }},
        sweep_, plan_);
    if (!points.ok()) return points.status();
    for (SweepPoint& point : *points) {
      point.backend = subject.kind;
      points_.push_back(std::move(point));
    }
    return absl::OkStatus();
  }

  // Against the CPU's full float16 head; int8 and subset heads may rightly choose other tokens.
  absl::Status check(Subject& subject, std::span<const std::vector<std::byte>> rows) {
    const bool exact = *head_ == HeadMode::kCertified || *head_ == HeadMode::kFull;
    if (!exact) return absl::OkStatus();
    BackendOptions options = backend_options("cpu");
    options.head = HeadMode::kFull;
    auto reference = open_client(options);
    if (!reference.ok()) return reference.status();
    // Another order of summation moves a logit by a few float32 roundings.
    const double tolerance = subject.kind == "cpu" ? 0 : 0x1p-10;
    return check_backend(*subject.backend, **reference, rows, plan_, tolerance);
  }

  std::string report() const {
    const RunDescription description{
        .tool = "engine_bench",
        .model_type = manifest_.model_type,
        .hidden_size = manifest_.hidden_size,
        .vocab_size = manifest_.vocab_size,
        .tied_embeddings = manifest_.tied_embeddings,
        .body = body_,
        .server = options_.server == "local" ? "local" : "remote",
        .head = options_.head,
        .wire = options_.wire,
        .cipher = cipher_,
        .max_tokens = options_.max_tokens,
        .threads = options_.threads,
        .libraries = library_versions(),
        .bench_options = {{"prefill_tokens", options_.prefill_tokens},
                          {"prompt_set", kPromptSet},
                          {"prompts", std::size(kPrompts)},
                          {"warmups", static_cast<std::uint64_t>(options_.warmups)},
                          {"runs", static_cast<std::uint64_t>(options_.runs)}},
        .read_bytes_per_second = read_speed_};
    std::vector<BenchRun> runs;
    for (const Subject& subject : subjects_) {
      runs.push_back(
          {.backend = subject.kind,
           .backend_name = std::string(subject.backend->name()),
           .load_ms = subject.load_ms,
           .requests = subject.requests.get(),
           .figures = {
               .link = subject.link->counters(),
               .client = subject.backend->memory(),
               .head = subject.backend->head_counters(),
               .memory = memory_,
               // One session at a time, and the last token is never sent.
               .peak_kv_positions = wanted("decode") ? kPromptTokens + options_.max_tokens - 1 : 0,
               .wall_ms = subject.requests->busy_ms()}});
    }
    return bench_report_json(description, runs, cases_, points_, options_.save_detailed);
  }

  const BenchOptions& options_;
  const Console& console_;
  Progress progress_;
  std::string stage_;
  BenchPlan plan_;
  std::optional<HeadMode> head_;
  std::filesystem::path folder_;
  ClientManifest manifest_;
  RunMemory memory_;
  std::string body_, cipher_;
  double read_speed_ = 0;
  std::optional<Endpoint> endpoint_;
  std::vector<Subject> subjects_;
  std::vector<CaseResult> cases_;
  SweepAxes sweep_;
  std::vector<SweepPoint> points_;
};

}  // namespace

absl::StatusOr<std::string> run_bench(const BenchOptions& options, const Console& console,
                                      std::stop_token stop) {
  return Bench(options, console, std::move(stop))();
}

}  // namespace infemeral
