#include "engine/gemm_tile.h"

namespace infemeral {

GemmKernel gemm_kernel_avx512() {
  return {run_tile<8, 8, 3>, 8, 8 * 3, "avx512"};
}

}  // namespace infemeral
