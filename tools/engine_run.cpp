// engine_run: prompts in, the model's text out, the transformer layers behind an encrypted stream.
#include <CLI/CLI.hpp>
#include <chrono>
#include <cstdio>
#include <map>
#include <memory>

#include "engine/json_file.h"
#include "engine/metrics.h"
#include "engine/pipeline.h"
#include "engine/report.h"
#include "engine/text.h"
#include "engine/text_generation.h"
#include "tools/batch.h"
#include "tools/cli.h"
#include "tools/console.h"
#include "tools/progress.h"
#include "tools/result_writer.h"
#include "tools/run_model.h"
#include "tools/run_options.h"
#include "tools/signals.h"

namespace infemeral {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::size_t kMaxResultBytes = std::size_t{1} << 36;

double ms_since(Clock::time_point begin) {
  return std::chrono::duration<double, std::milli>(Clock::now() - begin).count();
}

// A body may fail on one prompt, such as one whose numbers overflow. One that fails on so many in a
// row fails on all.
constexpr std::size_t kBodyFailures = 3;

class Run {
 public:
  Run(const RunOptions& options, const Console& console, std::stop_token stop)
      : options_(options), console_(console), stop_(stop) {}

  int operator()() {
    const auto begin = Clock::now();
    if (int code = read_input(); code != kExitOk) return code;
    // Before the slow parts: a run must not end for want of a place to put what it made.
    if (auto status = check_output_place(options_.report_file); !status.ok()) {
      return console_.fail(kExitUsage, status);
    }
    auto writer = ResultWriter::open({.file = options_.output_file,
                                      .overwrite = options_.overwrite,
                                      .append = options_.resume,
                                      .stream_text = options_.stream});
    if (!writer.ok()) return console_.fail(kExitUsage, writer.status());
    if (options_.resume) {
      if (int code = find_earlier_results(**writer); code != kExitOk) return code;
      if (n_done_ == items_.size() && !options_.check) return kExitOk;
    }
    if (int code = open_run_model(options_, console_, stop_, model_); code != kExitOk) return code;
    model_.description.load_ms = ms_since(begin);
    if (options_.check) return check();

    const auto run_begin = Clock::now();
    int code = run_items(**writer);
    if (const auto status = write_report(ms_since(run_begin)); !status.ok()) {
      code = console_.fail(kExitUsage, status);
    }
    return code;
  }

 private:
  int read_input() {
    if (!options_.input_file.empty()) {
      auto items = read_batch(options_.input_file);
      if (!items.ok()) return console_.fail(kExitUsage, items.status());
      items_ = *std::move(items);
    }
    for (const std::string& prompt : options_.prompts) {
      items_.push_back({.index = items_.size(), .prompt = prompt});
    }
    if (options_.parallel > 1 && (options_.output_file.empty() || options_.stream)) {
      return console_.fail(
          kExitUsage, absl::InvalidArgumentError(
                          "--parallel needs --output and no --stream: texts on stdout would mix"));
    }
    if (items_.empty() && !options_.check) {
      return console_.fail(kExitUsage,
                           absl::InvalidArgumentError("nothing to do: give -p PROMPT or -f FILE"));
    }
    return kExitOk;
  }

  int find_earlier_results(ResultWriter& writer) {
    const auto text = read_text_file(options_.output_file, kMaxResultBytes);
    if (!text.ok()) return console_.fail(kExitUsage, text.status());
    auto earlier = read_results(*text, items_);
    if (!earlier.ok()) {
      return console_.fail(
          kExitUsage, absl::InvalidArgumentError(cat("cannot continue ", options_.output_file, ": ",
                                                     std::string(earlier.status().message()))));
    }
    writer.keep(earlier->bytes, earlier->unended);
    done_ = std::move(earlier->finished);
    n_done_ = earlier->n_finished;
    log_to(console_.sink(), LogLevel::kInfo,
           cat(n_done_, " of ", items_.size(), " prompts have a result"));
    return kExitOk;
  }

  int check() {
    TextRequest request{.max_tokens = 1, .ignore_end_tokens = true};
    auto prompt = model_.assets.encode_prompt("Hello");
    if (!prompt.ok()) return console_.fail(kExitUsage, prompt.status());
    request.prompt = *std::move(prompt);
    TextResult result;
    const auto status = generate_text(*model_.pipeline, model_.assets, request, {}, stop_, result);
    if (!status.ok()) return console_.fail(server_exit_code(status), status);
    std::printf(
        "model:   %s, hidden size %zu, vocabulary %zu%s\n"
        "backend: %s\n"
        "server:  %s\n"
        "body:    %s, context %u\n"
        "channel: %s\n"
        "wire:    %s\n"
        "token:   ok, first one after %.1f ms\n",
        model_.description.model_type.c_str(), model_.description.hidden_size,
        model_.description.vocab_size, model_.description.tied_embeddings ? " (tied)" : "",
        model_.description.backend.c_str(), options_.server.c_str(), model_.session.body.c_str(),
        model_.session.max_context, model_.description.cipher.c_str(), options_.wire.c_str(),
        result.generation.ttft_ms);
    return std::fflush(stdout) == 0 ? kExitOk : kExitUsage;
  }

  // What is asked for an item; its error when it cannot be run.
  absl::StatusOr<TextRequest> request_for(const BatchItem& item) const {
    if (!item.status.ok()) return item.status;
    absl::StatusOr<std::vector<std::int32_t>> prompt;
    if (!item.messages.empty()) {
      prompt = model_.assets.encode_chat(item.messages);
    } else if (options_.chat) {
      const ChatMessage message{.role = "user", .content = item.prompt};
      prompt = model_.assets.encode_chat({&message, 1});
    } else if (item.prompt.empty()) {
      return absl::InvalidArgumentError("the prompt is empty");
    } else {
      prompt = model_.assets.encode_prompt(item.prompt);
    }
    if (!prompt.ok()) return prompt.status();
    TextRequest request{
        .prompt = *std::move(prompt),
        .max_tokens = item.options.max_tokens.value_or(options_.max_tokens),
        .sampling = sampling_for(model_.assets.defaults.sampling, options_.sampling, item.options),
        .stop = item.options.stop.empty() ? options_.sampling.stop : item.options.stop,
        .ignore_end_tokens = options_.ignore_end_tokens};
    if (request.max_tokens == 0) return absl::InvalidArgumentError("max_tokens must be at least 1");
    return request;
  }

  // An error that ends one item; any other ends the run.
  bool is_item_error(const absl::Status& status) {
    if (absl::IsInternal(status)) return ++n_body_failures_ < kBodyFailures;
    return absl::IsInvalidArgument(status) || absl::IsUnimplemented(status) ||
           absl::IsResourceExhausted(status);
  }

  // An item that was run. False when the run ends.
  bool end_item(const BatchItem& item, std::size_t prompt_tokens, const TextResult& result,
                const absl::Status& status) {
    if (status.ok()) n_body_failures_ = 0;
    if (!status.ok() && !is_item_error(status)) {
      report_.add(result.generation, prompt_tokens, true);
      return false;
    }
    return put_result(item, prompt_tokens, result, status);
  }

  // An item's line, and its share of the report. False when it cannot be written.
  bool put_result(const BatchItem& item, std::size_t prompt_tokens, const TextResult& result,
                  const absl::Status& status) {
    report_.add(result.generation, prompt_tokens, !status.ok());
    if (!status.ok()) {
      ++n_failed_;
      progress_->clear();
      console_.error(absl::Status(status.code(),
                                  cat("prompt ", item.index, ": ", std::string(status.message()))));
    }
    written_ =
        writer_->result(result_line(item, model_.name, prompt_tokens, result, status), status.ok());
    if (!written_.ok()) return false;
    ++n_done_;
    progress_->update("prompts", static_cast<double>(n_done_), static_cast<double>(items_.size()));
    return true;
  }

  int run_items(ResultWriter& writer) {
    // Text on the terminal and a bar on the same terminal would overwrite each other.
    Progress progress(console_.progress_enabled() && !writer.text_on_terminal());
    progress.update("prompts", static_cast<double>(n_done_), static_cast<double>(items_.size()));
    progress_ = &progress;
    writer_ = &writer;
    struct Running {
      const BatchItem* item;
      std::unique_ptr<TextJob> text;
    };
    std::map<GenerateJob*, Running> running;
    auto item = items_.begin();
    const auto next = [&]() -> GenerateJob* {
      for (; item != items_.end() && written_.ok(); ++item) {
        if (!done_.empty() && done_[item->index]) continue;
        absl::StatusOr<TextRequest> request = request_for(*item);
        if (!request.ok()) {
          put_result(*item, 0, {}, request.status());
          continue;
        }
        auto text = std::make_unique<TextJob>(model_.assets, *std::move(request),
                                              [&](std::string_view s) { writer.text(s); });
        GenerateJob* job = &text->job;
        running[job] = {&*item++, std::move(text)};
        return job;
      }
      return nullptr;
    };
    const auto done = [&](GenerateJob& job) {
      const Running ended = std::move(running.extract(&job).mapped());
      ended.text->finish();
      return end_item(*ended.item, job.request.prompt.size(), ended.text->result, job.status);
    };
    const absl::Status status = model_.pipeline->generate_all(next, done, stop_);
    for (auto& [job, cut_off] : running) {
      cut_off.text->finish();
      report_.add(cut_off.text->result.generation, job->request.prompt.size(), true);
    }
    progress.clear();
    if (!written_.ok()) return console_.fail(kExitUsage, written_);
    const std::string count = cat(n_done_, " of ", items_.size(), " prompts are done");
    if (absl::IsCancelled(status)) {
      console_.error(absl::CancelledError(cat("interrupted: ", count)));
      return kExitInterrupted;
    }
    if (!status.ok()) {
      console_.error(status);
      console_.error(absl::AbortedError(cat(count, "; the rest were not run")));
      return kExitServer;
    }
    if (const auto finished = writer.finish(); !finished.ok()) {
      return console_.fail(kExitUsage, finished);
    }
    if (options_.profile) std::fputs(report_.phase_table().c_str(), stderr);
    return n_failed_ > 0 ? kExitItemsFailed : kExitOk;
  }

  absl::Status write_report(double wall_ms) {
    if (options_.report_file.empty()) return absl::OkStatus();
    return replace_file(options_.report_file,
                        report_.json(model_.description,
                                     {.link = model_.link->counters(),
                                      .client = model_.backend->memory(),
                                      .head = model_.backend->head_counters(),
                                      .memory = model_.memory,
                                      .peak_kv_positions = model_.pipeline->peak_kv_positions(),
                                      .wall_ms = wall_ms},
                                     options_.profile));
  }

  const RunOptions& options_;
  const Console& console_;
  const std::stop_token stop_;
  std::vector<BatchItem> items_;
  std::vector<bool> done_;  // by an earlier run; empty without one
  std::size_t n_done_ = 0;  // by any run
  std::size_t n_failed_ = 0;
  std::size_t n_body_failures_ = 0;  // in a row
  absl::Status written_;             // why no more results can be written
  Progress* progress_ = nullptr;     // while items run
  ResultWriter* writer_ = nullptr;   // likewise
  RunModel model_;
  ReportBuilder report_;
};

}  // namespace
}  // namespace infemeral

int main(int argc, char** argv) {
  using namespace infemeral;
  return run_program("engine_run", [&]() -> int {
    SignalStop signals;
    RunOptions options;
    CLI::App app(
        "Generates text with a model whose layers run on a machine that does not see the text.\n"
        "Every option can also be set by an environment variable: --max-tokens is\n"
        "INFEMERAL_MAX_TOKENS.",
        "engine_run");
    add_run_flags(app, options);
    if (auto code = parse_command_line(app, argc, argv)) return *code;
    const Console console({.quiet = options.quiet});
    if (const auto status = check_run_options(options); !status.ok()) {
      return console.fail(kExitUsage, status);
    }
    return Run(options, console, signals.token())();
  });
}
