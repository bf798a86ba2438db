// Chooses the kernels that this machine runs best.
#pragma once

#include <vector>

#include "absl/status/statusor.h"
#include "cpu/simd/kernels.h"

namespace infemeral::simd {

// Every path that was compiled in and that this machine has, the fastest first, "portable" last.
std::vector<const Kernels*> available_kernels();

// The first of them, or the one that the environment variable INFEMERAL_ISA names.
// InvalidArgument, with the names to choose from, when there is no such path on this machine.
absl::StatusOr<const Kernels*> choose_kernels();

}  // namespace infemeral::simd
