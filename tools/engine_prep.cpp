// engine_prep: splits a Hugging Face model into a client folder and a rotated body.
#include <CLI/CLI.hpp>
#include <chrono>
#include <optional>
#include <string>

#include "absl/strings/str_format.h"
#include "cpu/prepare.h"
#include "engine/text.h"
#include "tools/cli.h"
#include "tools/console.h"
#include "tools/progress.h"
#include "tools/signals.h"

namespace infemeral {
namespace {

struct PrepOptions {
  std::string model;
  std::string output;
  std::string seed_file;
  std::string body_dtype = "f16";
  std::string cloak = "eager";
  int threads = 0;
  bool force = false;
  bool quiet = false;
};

void add_flags(CLI::App& app, PrepOptions& o) {
  with_env(app.add_option("--model", o.model,
                          "Hugging Face folder: config.json, safetensors, "
                          "tokenizer.json"))
      ->required();
  with_env(app.add_option("--output", o.output, "Where client/ and body/ are written"))->required();
  with_env(app.add_option("--body-dtype", o.body_dtype, "What the body's weights are stored in"))
      ->check(CLI::IsMember({"f16", "bf16", "f32"}))
      ->capture_default_str();
  with_env(app.add_option("--seed-file", o.seed_file,
                          "Key file of the cloak (32 bytes, mode 600); made afresh without it"));
  with_env(app.add_option("--cloak", o.cloak,
                          "eager stores the matrix beside its key; lazy makes it again in every "
                          "run, which takes seconds for a hidden size of 4096"))
      ->check(CLI::IsMember({"eager", "lazy"}))
      ->capture_default_str();
  with_env(app.add_option("-t,--threads", o.threads, "Threads; 0 is one a core"))
      ->check(CLI::Range(0, 1024))
      ->capture_default_str();
  with_env(app.add_flag("--force", o.force, "Replace what an earlier engine_prep wrote"));
  with_env(app.add_flag("--quiet", o.quiet, "Errors only"));
  add_version(app);
}

int prepare(const PrepOptions& o, const SignalStop& signals) {
  const Console console({.quiet = o.quiet});
  Progress progress(console.progress_enabled());
  std::optional<CloakSeed> seed;
  if (!o.seed_file.empty()) {
    auto loaded = CloakSeed::load(o.seed_file);
    if (!loaded.ok()) {
      console.error(loaded.status());
      return kExitUsage;
    }
    seed = *std::move(loaded);
  }

  const Dtype body_dtype = o.body_dtype == "f32"    ? Dtype::kF32
                           : o.body_dtype == "bf16" ? Dtype::kBF16
                                                    : Dtype::kF16;
  const auto begin = std::chrono::steady_clock::now();
  const LogSink sink = console.sink();
  const auto result = prepare_model({
      .model_dir = o.model,
      .output_dir = o.output,
      .body_dtype = body_dtype,
      .cloak_mode = o.cloak == "lazy" ? CloakMode::kLazy : CloakMode::kEager,
      .seed = seed ? &*seed : nullptr,
      .overwrite = o.force,
      .threads = o.threads,
      .log =
          [&](LogLevel level, std::string_view message) {
            progress.clear();
            sink(level, message);
          },
      .progress = [&](std::string_view stage, double done,
                      double total) { progress.update(stage, done, total); },
      .stop = signals.token(),
  });
  progress.clear();
  if (!result.ok()) {
    absl::Status status = result.status();
    if (absl::IsAlreadyExists(status)) {
      status = absl::AlreadyExistsError(
          cat(std::string(status.message()), " (--force replaces what engine_prep wrote)"));
    }
    console.error(status);
    return absl::IsCancelled(status) ? kExitInterrupted : kExitUsage;
  }
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  sink(LogLevel::kInfo,
       absl::StrFormat("%s prepared in %.1f s: client %.1f MB, body %.1f MB (%s)",
                       result->config.model_type, seconds,
                       static_cast<double>(result->client_bytes) / 1e6,
                       static_cast<double>(result->body_bytes) / 1e6, o.body_dtype));
  return kExitOk;
}

}  // namespace
}  // namespace infemeral

int main(int argc, char** argv) {
  using namespace infemeral;
  SignalStop signals;
  PrepOptions options;
  CLI::App app(
      "Splits a model into a client folder, which stays with you, and a body whose weights are\n"
      "rotated by a secret matrix.\n"
      "Every option can also be set by an environment variable: --output is INFEMERAL_OUTPUT.",
      "engine_prep");
  add_flags(app, options);
  if (auto code = parse_command_line(app, argc, argv)) return *code;
  return prepare(options, signals);
}
