#include "tools/backend_select.h"

#include "cpu/client_backend.h"
#include "engine/text.h"
#ifdef INFEMERAL_HAVE_CUDA
#include "kernels/client_backend.h"
#endif

namespace infemeral {

absl::StatusOr<std::unique_ptr<ClientBackend>> open_backend(ClientFolder folder,
                                                            const BackendOptions& options,
                                                            const LogSink& log) {
  if (options.name != "auto" && options.name != "cpu" && options.name != "cuda") {
    return absl::InvalidArgumentError(
        cat("there is no backend ", quote_name(options.name), "; choose auto, cpu or cuda"));
  }
  if (options.gpu_memory != "auto" && options.gpu_memory != "full" &&
      options.gpu_memory != "split") {
    return absl::InvalidArgumentError(cat("there is no GPU memory mode ",
                                          quote_name(options.gpu_memory),
                                          "; choose auto, full or split"));
  }
#ifdef INFEMERAL_HAVE_CUDA
  if (options.name != "cpu") {
    const std::filesystem::path path = folder.path;
    const CudaMemory memory = options.gpu_memory == "full"    ? CudaMemory::kFull
                              : options.gpu_memory == "split" ? CudaMemory::kSplit
                                                              : CudaMemory::kAuto;
    auto cuda = make_cuda_client_backend(
        std::move(folder),
        {.head = options.head, .memory = memory, .cloak_noise = options.cloak_noise}, log);
    if (cuda.ok()) {
      log_to(log, LogLevel::kDebug, cat("backend: ", (*cuda)->name()));
      return cuda;
    }
    const absl::Status& failed = cuda.status();
    // What the CPU would say too is not worth a second try.
    if (options.name == "cuda" || failed.code() == absl::StatusCode::kNotFound) {
      return failed.code() == absl::StatusCode::kUnavailable
                 ? absl::UnavailableError(cat(std::string(failed.message()), "; use --backend cpu"))
                 : failed;
    }
    log_to(log,
           failed.code() == absl::StatusCode::kUnavailable ? LogLevel::kInfo : LogLevel::kWarning,
           cat("running on the CPU: ", std::string(failed.message())));
    auto again = ClientFolder::open(path);
    if (!again.ok()) return again.status();
    folder = *std::move(again);
  }
#else
  if (options.name == "cuda") {
    return absl::UnimplementedError("this build has no CUDA backend; use --backend cpu");
  }
#endif
  auto backend = make_cpu_client_backend(std::move(folder), {.threads = options.threads,
                                                             .head = options.head,
                                                             .cloak_noise = options.cloak_noise,
                                                             .progress = options.progress});
  if (backend.ok()) log_to(log, LogLevel::kDebug, cat("backend: ", (*backend)->name()));
  return backend;
}

}  // namespace infemeral
