// The one place that knows which backends this build has.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "engine/backend.h"
#include "engine/certified_head.h"
#include "engine/client_folder.h"
#include "engine/log.h"

namespace infemeral {

struct BackendOptions {
  std::string name = "auto";  // "auto", "cpu" or "cuda"
  int threads = 0;            // of the CPU backend; 0: one for each physical core
  HeadMode head = HeadMode::kCertified;
  float cloak_noise = 0;            // engine/cloak_noise.h
  std::string gpu_memory = "auto";  // "auto", "full" or "split": kernels/client_backend.h
  std::function<void(double done, double total)> progress;  // of the CPU backend: CpuOptions
};

// InvalidArgument for a name that does not exist; Unimplemented for one that this build lacks.
absl::StatusOr<std::unique_ptr<ClientBackend>> open_backend(ClientFolder folder,
                                                            const BackendOptions& options,
                                                            const LogSink& log);

}  // namespace infemeral
