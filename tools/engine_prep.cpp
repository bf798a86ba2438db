// engine_prep: splits a Hugging Face model into a client folder and a rotated body; counts tokens
// for the subset head.
#include <CLI/CLI.hpp>
#include <chrono>
#include <optional>
#include <string>

#include "absl/strings/str_format.h"
#include "cpu/prepare.h"
#include "engine/generation_config.h"
#include "engine/json_file.h"
#include "engine/model_config.h"
#include "engine/text.h"
#include "engine/text_generation.h"
#include "engine/token_subset.h"
#include "engine/tokenizer.h"
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
  std::string token_counts;
  std::size_t subset_size = 10000;
  std::string body_dtype = "f16";
  std::string cloak = "eager";
  int threads = 0;
  bool fold_cloak = false;
  bool force = false;
  bool quiet = false;
};

void add_flags(CLI::App& app, PrepOptions& o) {
  auto* model = with_env(app.add_option(
      "--model", o.model, "Hugging Face folder: config.json, safetensors, tokenizer.json"));
  with_env(app.add_option("--output", o.output, "Where client/ and body/ are written"))->required();
  with_env(app.add_option("--body-dtype", o.body_dtype, "What the body's weights are stored in"))
      ->check(CLI::IsMember({"f16", "bf16", "f32", "i8"}))
      ->needs(model)
      ->capture_default_str();
  with_env(app.add_option("--seed-file", o.seed_file,
                          "Key file of the cloak (32 bytes, mode 600); made afresh without it"))
      ->needs(model);
  auto* cloak = with_env(app.add_option(
                             "--cloak", o.cloak,
                             "eager stores the matrix beside its key; lazy makes it again in every "
                             "run, which takes seconds for a hidden size of 4096"))
                    ->check(CLI::IsMember({"eager", "lazy"}))
                    ->needs(model)
                    ->capture_default_str();
  with_env(app.add_flag("--fold-cloak", o.fold_cloak,
                        "Store the client's tables rotated, so that no token needs the matrix: "
                        "the embedding and lm_head are two tables even where a model ties them, "
                        "and both are then as secret as the key; for the CPU client only"))
      ->needs(model)
      ->excludes(cloak);
  auto* counts = with_env(app.add_option(
      "--token-counts", o.token_counts,
      "Text like the one to be generated: its most frequent tokens are kept for engine_run --head "
      "subset; without --model, in the client folder that --output has already"));
  with_env(app.add_option("--subset-size", o.subset_size, "How many of them are kept"))
      ->check(CLI::Range(std::size_t{1}, std::size_t{1} << 31))
      ->needs(counts)
      ->capture_default_str();
  with_env(app.add_option("-t,--threads", o.threads, "Threads; 0 is one for each physical core"))
      ->check(CLI::Range(0, 1024))
      ->capture_default_str();
  with_env(app.add_flag("--force", o.force, "Replace what an earlier engine_prep wrote"));
  with_env(app.add_flag("--quiet", o.quiet, "Errors only"));
  add_version(app);
}

constexpr std::size_t kMaxTextBytes = std::size_t{512} << 20;  // what Tokenizer::encode takes

constexpr char kForceHint[] = " (--force replaces what engine_prep wrote)";

// Counts the tokens of `text`, which came from --token-counts, into a client folder that is there.
absl::Status keep_token_counts(const PrepOptions& o, std::string_view text, const LogSink& log) {
  const std::filesystem::path folder = client_folder(o.output);
  const auto manifest = load_client_manifest(folder);
  if (!manifest.ok()) return manifest.status();
  if (const auto present = load_token_subset(*manifest, folder).status();
      !o.force && !absl::IsNotFound(present)) {
    return absl::AlreadyExistsError(cat(folder.string(), " has token counts already", kForceHint));
  }
  const auto assets = TextAssets::load(folder);
  if (!assets.ok()) return assets.status();
  const auto subset = count_tokens(*assets->tokenizer, assets->defaults.end_tokens, text,
                                   manifest->vocab_size, o.subset_size);
  if (!subset.ok()) {
    return absl::Status(subset.status().code(),
                        to_absl(cat(o.token_counts, ": ", subset.status().message())));
  }
  if (auto status = save_token_subset(subset->ids, *manifest, folder); !status.ok()) return status;
  log(LogLevel::kInfo,
      absl::StrFormat(
          "kept the %d most frequent tokens: %.2f %% of the %d in the text", subset->ids.size(),
          100 * static_cast<double>(subset->covered) / static_cast<double>(subset->text_tokens),
          subset->text_tokens));
  return absl::OkStatus();
}

// What engine_run will ask of the model's text side: said before the slow part. prepare_model()
// itself says what is wrong with the rest.
absl::Status check_text_side(const std::filesystem::path& model, const LogSink& log) {
  const auto tokenizer = Tokenizer::load(model / "tokenizer.json");
  if (absl::IsNotFound(tokenizer.status())) return absl::OkStatus();
  if (!tokenizer.ok()) return tokenizer.status();
  if (const auto defaults = load_generation_config(model); !defaults.ok()) {
    return defaults.status();
  }
  const auto config = load_model_config(model);
  if (config.ok() && (*tokenizer)->vocab_size() > config->vocab_size) {
    log_to(log, LogLevel::kWarning,
           cat("the tokenizer has ", (*tokenizer)->vocab_size(), " tokens and the model knows ",
               config->vocab_size, "; prompts with others are refused"));
  }
  return absl::OkStatus();
}

int prepare(const PrepOptions& o, const Console& console, const SignalStop& signals) {
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
  if (const absl::Status status = check_text_side(o.model, console.sink()); !status.ok()) {
    console.error(status);
    return kExitUsage;
  }

  const Dtype body_dtype = o.body_dtype == "f32"    ? Dtype::kF32
                           : o.body_dtype == "bf16" ? Dtype::kBF16
                           : o.body_dtype == "i8"   ? Dtype::kI8
                                                    : Dtype::kF16;
  const auto begin = std::chrono::steady_clock::now();
  const LogSink sink = console.sink();
  const auto result = prepare_model({
      .model_dir = o.model,
      .output_dir = o.output,
      .body_dtype = body_dtype,
      .cloak_mode = o.fold_cloak        ? CloakMode::kFolded
                    : o.cloak == "lazy" ? CloakMode::kLazy
                                        : CloakMode::kEager,
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
      status = absl::AlreadyExistsError(cat(status.message(), kForceHint));
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

int run(const PrepOptions& o, const SignalStop& signals) {
  const Console console({.quiet = o.quiet});
  if (o.model.empty() && o.token_counts.empty()) {
    console.error(absl::InvalidArgumentError(
        "nothing to do: give --model HF_DIR, or --token-counts TEXT_FILE for a client folder that "
        "is there"));
    return kExitUsage;
  }
  absl::StatusOr<std::string> text;
  if (!o.token_counts.empty()) {  // before the slow part, which must not be done for nothing
    text = read_text_file(o.token_counts, kMaxTextBytes);
    if (!text.ok()) {
      console.error(text.status());
      return kExitUsage;
    }
  }
  if (!o.model.empty()) {
    if (int code = prepare(o, console, signals); code != kExitOk) return code;
  }
  if (!o.token_counts.empty()) {
    if (auto status = keep_token_counts(o, *text, console.sink()); !status.ok()) {
      console.error(status);
      return kExitUsage;
    }
  }
  return kExitOk;
}

}  // namespace
}  // namespace infemeral

int main(int argc, char** argv) {
  using namespace infemeral;
  return run_program("engine_prep", [&]() -> int {
    SignalStop signals;
    PrepOptions options;
    CLI::App app(
        "Splits a model into a client folder, which stays with you, and a body whose weights are\n"
        "rotated by a secret matrix; and counts tokens for the subset head, then or later.\n"
        "Every option can also be set by an environment variable: --output is INFEMERAL_OUTPUT.",
        "engine_prep");
    add_flags(app, options);
    if (auto code = parse_command_line(app, argc, argv)) return *code;
    return run(options, signals);
  });
}
