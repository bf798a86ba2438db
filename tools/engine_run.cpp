// engine_run: prompts in, the model's text out, the transformer layers behind an encrypted stream.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <optional>

#include "engine/cloak_noise.h"
#include "engine/json_file.h"
#include "engine/metrics.h"
#include "engine/pipeline.h"
#include "engine/report.h"
#include "engine/text.h"
#include "engine/text_generation.h"
#include "tools/backend_select.h"
#include "tools/batch.h"
#include "tools/cli.h"
#include "tools/console.h"
#include "tools/endpoint.h"
#include "tools/progress.h"
#include "tools/result_writer.h"
#include "tools/signals.h"

namespace infemeral {
namespace {

using Clock = std::chrono::steady_clock;

double ms_since(Clock::time_point begin) {
  return std::chrono::duration<double, std::milli>(Clock::now() - begin).count();
}

struct RunOptions {
  std::string model;
  std::string server = "local";
  std::string server_key;
  std::string identity;
  std::vector<std::string> prompts;
  std::string input_file;
  std::string output_file;
  std::string report_file;
  std::uint32_t max_tokens = 128;
  ItemOptions sampling;  // what the command line sets; the model's own defaults fill the rest
  bool ignore_end_tokens = false;
  bool chat = false;
  std::string backend = "auto";
  float cloak_noise = 0;
  std::string gpu_memory = "auto";
  int threads = 0;
  std::string head = "certified";
  std::string wire = "f16";
  bool profile = false;
  bool stream = false;
  bool quiet = false;
  bool check = false;
  bool overwrite = false;
};

void add_flags(CLI::App& app, RunOptions& o) {
  const auto option = [&](const std::string& flags, auto& value, const std::string& help) {
    return with_env(app.add_option(flags, value, help));
  };
  const auto flag = [&](const std::string& flags, bool& value, const std::string& help) {
    return with_env(app.add_flag(flags, value, help));
  };
  option("-m,--model", o.model, "Folder that engine_prep wrote (or its client folder)")->required();
  option("--server", o.server, "HOST:PORT of engine_serve, or \"local\"")->capture_default_str();
  option("--server-key", o.server_key, "The server's public key, or a file that holds it");
  option("--identity", o.identity, "This client's secret key file, from engine_keygen");
  auto* prompt = option("-p,--prompt", o.prompts, "A prompt; may be given several times");
  auto* file = option("-f,--file", o.input_file,
                      "Prompts: text (one a line), JSON lines or OpenAI batch lines; - for stdin");
  prompt->excludes(file);
  option("-o,--output", o.output_file, "Result lines as JSON; - for stdout");
  flag("--overwrite", o.overwrite, "Replace an existing output file");
  option("--report", o.report_file, "Write a JSON report of the run");
  option("-n,--max-tokens", o.max_tokens, "Tokens to generate for a prompt")->capture_default_str();
  option("--temp", o.sampling.temperature, "Temperature; 0 is greedy (default: the model's own)");
  option("--top-k", o.sampling.top_k, "Keep the k likeliest tokens; 0 is off");
  option("--top-p", o.sampling.top_p, "Keep the likeliest tokens up to this probability");
  option("--min-p", o.sampling.min_p, "Drop tokens below this share of the likeliest one's");
  option("--repeat-penalty", o.sampling.repetition_penalty, "Repetition penalty; 1 is off");
  option("-s,--seed", o.sampling.seed, "The same seed gives the same tokens (default: 0)");
  option("--stop", o.sampling.stop, "End at this text; may be given several times");
  flag("--ignore-eos", o.ignore_end_tokens, "Go on after the model's end token");
  flag("--chat", o.chat, "Prompts are user messages: apply the model's chat template");
  option("--backend", o.backend, "auto, cpu or cuda")->capture_default_str();
  option("--gpu-memory", o.gpu_memory,
         "Float16 weights on the GPU (full) or in host memory (split); auto: full where it fits")
      ->capture_default_str();
  option("-t,--threads", o.threads, "Threads; 0 is one for each physical core")
      ->check(CLI::Range(0, 1024))
      ->capture_default_str();
  option("--head", o.head,
         "certified: the full head's tokens from an int8 product and a proof; full: the float16 "
         "product; int8: the int8 product without the proof; subset: the most frequent tokens "
         "where they seem enough, without proof (engine_prep --token-counts)")
      ->capture_default_str();
  option("--cloak-noise", o.cloak_noise,
         "Add Gaussian noise of this share of a cloaked row's size; costs accuracy, hides little")
      ->check(CLI::Range(0.0f, kMaxCloakNoise))
      ->capture_default_str();
  option("--wire", o.wire, "Hidden states on the wire: f32, f16 or i8")->capture_default_str();
  flag("--profile", o.profile, "Print where a token's time goes; the report holds every token");
  flag("--stream", o.stream, "Print text on stdout as it is made");
  flag("--quiet", o.quiet, "Errors only on stderr");
  flag("--check", o.check, "Connect, generate one token, print what was found, and end");
  add_version(app);
}

std::filesystem::path body_folder(const std::filesystem::path& client) {
  const auto absolute = std::filesystem::absolute(client).lexically_normal();
  return (absolute.has_filename() ? absolute.parent_path() : absolute.parent_path().parent_path()) /
         "body";
}

SamplingParams sampling_for(const SamplingParams& model, const ItemOptions& command_line,
                            const ItemOptions& item) {
  SamplingParams p = model;
  for (const ItemOptions* o : {&command_line, &item}) {
    p.temperature = o->temperature.value_or(p.temperature);
    p.top_k = o->top_k.value_or(p.top_k);
    p.top_p = o->top_p.value_or(p.top_p);
    p.min_p = o->min_p.value_or(p.min_p);
    p.repetition_penalty = o->repetition_penalty.value_or(p.repetition_penalty);
    p.seed = o->seed.value_or(p.seed);
  }
  return p;
}

// An error that ends one item; any other ends the run.
bool is_item_error(const absl::Status& status) {
  return absl::IsInvalidArgument(status) || absl::IsUnimplemented(status) ||
         absl::IsResourceExhausted(status);
}

int fail(const Console& console, int code, const absl::Status& status) {
  console.error(status);
  return code;
}

class Run {
 public:
  Run(const RunOptions& options, const Console& console, std::stop_token stop)
      : options_(options), console_(console), stop_(stop) {}

  int operator()() {
    const auto begin = Clock::now();
    if (int code = read_input(); code != kExitOk) return code;
    // Before the slow parts: a run must not end for want of a place to put what it made.
    if (auto status = check_report_place(); !status.ok()) return fail(console_, kExitUsage, status);
    auto writer = ResultWriter::open({.file = options_.output_file,
                                      .overwrite = options_.overwrite,
                                      .stream_text = options_.stream});
    if (!writer.ok()) return fail(console_, kExitUsage, writer.status());
    if (int code = open_model(); code != kExitOk) return code;
    description_.load_ms = ms_since(begin);
    if (options_.check) return check();

    const auto run_begin = Clock::now();
    int code = run_items(**writer);
    if (const auto status = write_report(ms_since(run_begin)); !status.ok()) {
      code = fail(console_, kExitUsage, status);
    }
    return code;
  }

 private:
  int read_input() {
    wire_ = parse_wire_dtype(options_.wire);
    if (!wire_) {
      return fail(console_, kExitUsage,
                  absl::InvalidArgumentError("--wire must be f32, f16 or i8"));
    }
    head_ = parse_head_mode(options_.head);
    if (!head_) {
      return fail(console_, kExitUsage,
                  absl::InvalidArgumentError("--head must be certified, full, int8 or subset"));
    }
    if (!options_.input_file.empty()) {
      auto items = read_batch(options_.input_file);
      if (!items.ok()) return fail(console_, kExitUsage, items.status());
      items_ = *std::move(items);
    }
    for (const std::string& prompt : options_.prompts) {
      items_.push_back({.index = items_.size(), .prompt = prompt});
    }
    if (items_.empty() && !options_.check) {
      return fail(console_, kExitUsage,
                  absl::InvalidArgumentError("nothing to do: give -p PROMPT or -f FILE"));
    }
    return kExitOk;
  }

  int open_model() {
    const auto folder_path = client_folder(options_.model);
    auto folder = ClientFolder::open(folder_path);
    if (!folder.ok()) return fail(console_, kExitUsage, folder.status());
    auto assets = TextAssets::load(folder_path);
    if (!assets.ok()) return fail(console_, kExitUsage, assets.status());
    assets_ = *std::move(assets);

    const ClientManifest manifest = folder->manifest;
    auto backend = open_backend(*std::move(folder),
                                {.name = options_.backend,
                                 .threads = options_.threads,
                                 .head = *head_,
                                 .cloak_noise = options_.cloak_noise,
                                 .gpu_memory = options_.gpu_memory},
                                console_.sink());
    if (!backend.ok()) return fail(console_, kExitUsage, backend.status());
    backend_ = *std::move(backend);

    auto endpoint = Endpoint::open({.server = options_.server,
                                    .server_key = options_.server_key,
                                    .identity = options_.identity,
                                    .body_folder = body_folder(folder_path),
                                    .threads = options_.threads,
                                    .log = console_.sink()},
                                   manifest);
    if (!endpoint.ok()) return fail(console_, kExitUsage, endpoint.status());
    endpoint_ = *std::move(endpoint);
    auto link = endpoint_->connect(stop_);
    if (!link.ok()) {
      // The only thing that can be wrong with the request before the network is the address.
      const bool usage = absl::IsInvalidArgument(link.status());
      return fail(console_, usage ? kExitUsage : server_exit_code(link.status()), link.status());
    }
    link_ = *std::move(link);
    pipeline_.emplace(*backend_, *link_,
                      PipelineOptions{.wire = *wire_, .max_context = manifest.max_context});
    auto session = pipeline_->open(stop_);
    if (!session.ok()) return fail(console_, server_exit_code(session.status()), session.status());

    session_ = *session;
    model_name_ = std::filesystem::absolute(options_.model).lexically_normal().filename().string();
    description_ = {.tool = "engine_run",
                    .model_type = manifest.model_type,
                    .hidden_size = manifest.hidden_size,
                    .vocab_size = manifest.vocab_size,
                    .tied_embeddings = manifest.tied_embeddings,
                    .backend = std::string(backend_->name()),
                    .body = session_.body,
                    .server = options_.server == "local" ? "local" : "remote",
                    .head = options_.head,
                    .wire = options_.wire,
                    .cipher = link_->cipher(),
                    .max_tokens = options_.max_tokens,
                    .threads = options_.threads};
    return kExitOk;
  }

  static int server_exit_code(const absl::Status& status) {
    return absl::IsCancelled(status) ? kExitInterrupted : kExitServer;
  }

  int check() {
    TextRequest request{.max_tokens = 1, .ignore_end_tokens = true};
    auto prompt = assets_.encode_prompt("Hello");
    if (!prompt.ok()) return fail(console_, kExitUsage, prompt.status());
    request.prompt = *std::move(prompt);
    TextResult result;
    const auto status = generate_text(*pipeline_, assets_, request, {}, stop_, result);
    if (!status.ok()) return fail(console_, server_exit_code(status), status);
    std::printf(
        "model:   %s, hidden size %zu, vocabulary %zu%s\n"
        "backend: %s\n"
        "server:  %s\n"
        "body:    %s, context %u\n"
        "channel: %s\n"
        "wire:    %s\n"
        "token:   ok, first one after %.1f ms\n",
        description_.model_type.c_str(), description_.hidden_size, description_.vocab_size,
        description_.tied_embeddings ? " (tied)" : "", description_.backend.c_str(),
        options_.server.c_str(), session_.body.c_str(), session_.max_context,
        description_.cipher.c_str(), options_.wire.c_str(), result.generation.ttft_ms);
    return std::fflush(stdout) == 0 ? kExitOk : kExitUsage;
  }

  absl::Status run_item(const BatchItem& item, ResultWriter& writer, std::size_t& prompt_tokens,
                        TextResult& result) {
    if (!item.status.ok()) return item.status;
    absl::StatusOr<std::vector<std::int32_t>> prompt;
    if (!item.messages.empty()) {
      prompt = assets_.encode_chat(item.messages);
    } else if (options_.chat) {
      const ChatMessage message{.role = "user", .content = item.prompt};
      prompt = assets_.encode_chat({&message, 1});
    } else if (item.prompt.empty()) {
      return absl::InvalidArgumentError("the prompt is empty");
    } else {
      prompt = assets_.encode_prompt(item.prompt);
    }
    if (!prompt.ok()) return prompt.status();
    prompt_tokens = prompt->size();
    TextRequest request{
        .prompt = *std::move(prompt),
        .max_tokens = item.options.max_tokens.value_or(options_.max_tokens),
        .sampling = sampling_for(assets_.defaults.sampling, options_.sampling, item.options),
        .stop = item.options.stop.empty() ? options_.sampling.stop : item.options.stop,
        .ignore_end_tokens = options_.ignore_end_tokens};
    if (request.max_tokens == 0) return absl::InvalidArgumentError("max_tokens must be at least 1");
    return generate_text(
        *pipeline_, assets_, request, [&](std::string_view piece) { writer.text(piece); }, stop_,
        result);
  }

  int run_items(ResultWriter& writer) {
    // Text on the terminal and a bar on the same terminal would overwrite each other.
    Progress progress(console_.progress_enabled() && !writer.text_on_terminal());
    int failed = 0;
    for (const BatchItem& item : items_) {
      progress.update("prompts", static_cast<double>(item.index),
                      static_cast<double>(items_.size()));
      TextResult result;
      std::size_t prompt_tokens = 0;
      const absl::Status status = run_item(item, writer, prompt_tokens, result);
      report_.add(result.generation, prompt_tokens, !status.ok());
      if (!status.ok()) {
        progress.clear();
        if (absl::IsCancelled(status)) {
          console_.error(absl::CancelledError(
              cat("interrupted: ", item.index, " of ", items_.size(), " prompts are done")));
          return kExitInterrupted;
        }
        if (!is_item_error(status)) {
          console_.error(status);
          console_.error(absl::AbortedError(
              cat(item.index, " of ", items_.size(), " prompts are done; the rest were not run")));
          return kExitServer;
        }
        ++failed;
        console_.error(absl::Status(
            status.code(), cat("prompt ", item.index, ": ", std::string(status.message()))));
      }
      const absl::Status written =
          writer.result(result_line(item, model_name_, prompt_tokens, result, status), status.ok());
      if (!written.ok()) return fail(console_, kExitUsage, written);
    }
    progress.clear();
    if (const auto status = writer.finish(); !status.ok())
      return fail(console_, kExitUsage, status);
    if (options_.profile) std::fputs(report_.phase_table().c_str(), stderr);
    return failed > 0 ? kExitItemsFailed : kExitOk;
  }

  absl::Status check_report_place() const {
    if (options_.report_file.empty()) return absl::OkStatus();
    const auto folder = std::filesystem::path(options_.report_file).parent_path();
    if (::access(folder.empty() ? "." : folder.c_str(), W_OK) != 0) {
      return errno_status(errno, "cannot write", options_.report_file);
    }
    return absl::OkStatus();
  }

  absl::Status write_report(double wall_ms) {
    if (options_.report_file.empty()) return absl::OkStatus();
    return replace_file(options_.report_file,
                        report_.json(description_, link_->counters(), backend_->memory(),
                                     backend_->head_counters(), wall_ms, options_.profile));
  }

  const RunOptions& options_;
  const Console& console_;
  const std::stop_token stop_;
  std::optional<WireDtype> wire_;
  std::optional<HeadMode> head_;
  std::vector<BatchItem> items_;
  TextAssets assets_;
  std::unique_ptr<ClientBackend> backend_;
  std::optional<Endpoint> endpoint_;
  std::unique_ptr<Link> link_;
  std::optional<Pipeline> pipeline_;  // destroyed before what it borrows
  SessionInfo session_;
  std::string model_name_;
  RunDescription description_;
  ReportBuilder report_;
};

}  // namespace
}  // namespace infemeral

int main(int argc, char** argv) {
  using namespace infemeral;
  SignalStop signals;
  RunOptions options;
  CLI::App app(
      "Generates text with a model whose layers run on a machine that does not see the text.\n"
      "Every option can also be set by an environment variable: --max-tokens is\n"
      "INFEMERAL_MAX_TOKENS.",
      "engine_run");
  add_flags(app, options);
  if (auto code = parse_command_line(app, argc, argv)) return *code;
  const Console console({.quiet = options.quiet});
  return Run(options, console, signals.token())();
}
