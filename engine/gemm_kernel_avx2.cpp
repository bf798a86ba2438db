#include "engine/gemm_tile.h"

namespace infemeral {

GemmKernel gemm_kernel_avx2() {
  return {run_tile<4, 4, 3>, 4, 4 * 3, "avx2"};
}

}  // namespace infemeral
