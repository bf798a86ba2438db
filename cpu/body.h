// Body on the CPU: the transformer layers of the Llama family over a memory-mapped checkpoint.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>

#include "absl/status/statusor.h"
#include "engine/body.h"

namespace infemeral {

struct CpuBodyOptions {
  int threads = 0;                // 0: physical cores
  std::uint32_t max_context = 0;  // positions a session may hold; 0: the model's
};

// Loads a checkpoint that engine_prep rotated, whose infemeral.json says to which client it
// belongs, or a plain one, whose fingerprints are then zero. Weights in f16, bf16, f32 or
// engine_prep's i8 stay mapped. NotFound for a folder without config.json; InvalidArgument for a
// max_context beyond the model's; DataLoss for a damaged infemeral.json; otherwise the errors of
// Safetensors, load_model_config and simd::choose_kernels.
//
// A row's result does not depend on the rows, sessions and threads that it shares a run() with: all
// of them give the same bits.
absl::StatusOr<std::unique_ptr<Body>> load_cpu_body(const std::filesystem::path& folder,
                                                    const CpuBodyOptions& options);

}  // namespace infemeral
