#include "engine/gemm_tile.h"

namespace infemeral {

GemmKernels gemm_kernels_baseline() {
  return tile_kernels<16, 4, 2>("baseline");
}

}  // namespace infemeral
