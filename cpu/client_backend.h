// ClientBackend on the CPU: the readable specification of the others. Stages, in the order and
// under the names of engine/metrics.h: embed, cloak; decode, uncloak, de_embed, sample.
#pragma once

#include <functional>
#include <memory>

#include "absl/status/statusor.h"
#include "engine/backend.h"
#include "engine/certified_head.h"
#include "engine/client_folder.h"

namespace infemeral {

struct CpuOptions {
  int threads = 0;  // 0: physical cores
  HeadMode head = HeadMode::kCertified;
  float cloak_noise = 0;  // engine/cloak_noise.h; 0: off
  // While the int8 copy is made; one call at a time, from any thread.
  std::function<void(double done, double total)> progress;
};

// Takes over the folder, whose weights stay mapped. For the certified and the int8 head the int8
// copy of lm_head is made here, which reads all of it; for the subset head a copy of the subset's
// rows. The cloak's matrix is loaded or made on first use and kept; its time counts as cloak or
// uncloak; a folder with folded tables has no use for it. Errors: those of simd::choose_kernels,
// and of load_token_subset for the subset head.
absl::StatusOr<std::unique_ptr<ClientBackend>> make_cpu_client_backend(ClientFolder folder,
                                                                       const CpuOptions& options);

}  // namespace infemeral
