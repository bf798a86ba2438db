#include "engine/gemm_tile.h"

namespace infemeral {

GemmKernel gemm_kernel_baseline() {
  return {run_tile<2, 4, 2>, 4, 2 * 2, "baseline"};
}

}  // namespace infemeral
