#include "tools/backend_select.h"

#include "cpu/client_backend.h"
#include "engine/text.h"

namespace infemeral {

absl::StatusOr<std::unique_ptr<ClientBackend>> open_backend(ClientFolder folder,
                                                            const BackendOptions& options,
                                                            const LogSink& log) {
  if (options.name == "cuda") {
    return absl::UnimplementedError("this build has no CUDA backend; use --backend cpu");
  }
  if (options.name != "auto" && options.name != "cpu") {
    return absl::InvalidArgumentError(
        cat("there is no backend ", quote_name(options.name), "; choose auto, cpu or cuda"));
  }
  auto backend = make_cpu_client_backend(std::move(folder),
                                         {.threads = options.threads, .head = options.head});
  if (backend.ok()) log_to(log, LogLevel::kDebug, cat("backend: ", (*backend)->name()));
  return backend;
}

}  // namespace infemeral
