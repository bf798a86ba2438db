#include "engine/gemm_tile.h"

namespace infemeral {

GemmKernels gemm_kernels_avx512() {
  return tile_kernels<64, 14, 2>("avx512");
}

}  // namespace infemeral
