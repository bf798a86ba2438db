#include "engine/gemm_tile.h"

namespace infemeral {

GemmKernels gemm_kernels_avx2() {
  return tile_kernels<32, 4, 3>("avx2");
}

}  // namespace infemeral
