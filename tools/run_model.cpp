#include "tools/run_model.h"

#include <chrono>
#include <cmath>
#include <filesystem>
#include <utility>

#include "engine/client_folder.h"
#include "net/library_versions.h"
#include "tools/backend_select.h"
#include "tools/cli.h"
#include "tools/progress.h"
#include "tools/run_memory.h"

namespace infemeral {
namespace {

std::chrono::milliseconds milliseconds(double seconds) {
  return std::chrono::milliseconds(std::llround(1e3 * seconds));
}

}  // namespace

int open_run_model(const RunOptions& options, const Console& console, std::stop_token stop,
                   RunModel& model) {
  const auto folder_path = client_folder(options.model);
  auto folder = ClientFolder::open(folder_path);
  if (!folder.ok()) return console.fail(kExitUsage, folder.status());
  const ClientManifest manifest = folder->manifest;
  EarlyLink early({.server = options.server,
                   .server_key = options.server_key,
                   .identity = options.identity,
                   .tls = options.tls,
                   .pad = options.pad,
                   .body_folder = body_folder(folder_path),
                   .threads = options.threads,
                   .connect_timeout = milliseconds(options.connect_timeout),
                   .step_timeout = milliseconds(options.step_timeout),
                   .log = console.sink()},
                  manifest, stop);
  auto assets = TextAssets::load(folder_path);
  if (!assets.ok()) return console.fail(kExitUsage, assets.status());
  model.assets = *std::move(assets);
  model.memory = table_memory(*folder);
  Progress progress(console.progress_enabled());
  const auto begin = std::chrono::steady_clock::now();
  auto backend = open_backend(
      *std::move(folder),
      {.name = options.backend,
       .threads = options.threads,
       .head = options.head_mode,
       .cloak_noise = options.cloak_noise,
       .gpu_memory = options.gpu_memory,
       .progress =
           [&](double done, double total) {
             // A small model is ready before a bar could be read.
             if (std::chrono::steady_clock::now() - begin > std::chrono::milliseconds(300))
               progress.update("load", done, total);
           }},
      console.sink());
  progress.clear();
  if (!backend.ok()) return console.fail(kExitUsage, backend.status());
  model.backend = *std::move(backend);

  EarlyLink::Result connected = early.take();
  if (!connected.endpoint_status.ok()) {
    return console.fail(kExitUsage, connected.endpoint_status);
  }
  if (const auto& status = connected.link_status; !status.ok()) {
    // The only thing that can be wrong with the request before the network is the address.
    const bool usage = absl::IsInvalidArgument(status) && connected.link == nullptr;
    return console.fail(usage ? kExitUsage : server_exit_code(status), status);
  }
  model.endpoint = std::move(connected.endpoint);
  model.link = std::move(connected.link);
  model.session = connected.session;
  model.pipeline.emplace(
      *model.backend, *model.link,
      PipelineOptions{
          .wire = options.wire_dtype,
          .sessions = options.parallel,
          .max_context = manifest.max_context,
          .max_draft = options.max_draft,
          .retry = {.attempts = options.retry, .max_time = milliseconds(options.retry_max_time)},
          .log = console.sink()});
  if (auto status = model.pipeline->adopt(model.session); !status.ok()) {
    return console.fail(kExitServer, status);
  }
  model.name = std::filesystem::absolute(options.model).lexically_normal().filename().string();
  model.description = {.tool = "engine_run",
                       .model_type = manifest.model_type,
                       .hidden_size = manifest.hidden_size,
                       .vocab_size = manifest.vocab_size,
                       .tied_embeddings = manifest.tied_embeddings,
                       .backend = std::string(model.backend->name()),
                       .body = model.session.body,
                       .server = options.server == "local" ? "local" : "remote",
                       .head = options.head,
                       .wire = options.wire,
                       .cipher = model.link->cipher(),
                       .max_tokens = options.max_tokens,
                       .max_draft = options.max_draft,
                       .threads = options.threads,
                       .libraries = library_versions()};
  put_body_memory(*model.endpoint, body_folder(folder_path), model.memory);
  return kExitOk;
}

}  // namespace infemeral
