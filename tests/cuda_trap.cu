#include "tests/cuda_trap.h"

namespace infemeral {
namespace {

__global__ void trap_kernel() {
  __trap();
}

}  // namespace

void break_device() {
  trap_kernel<<<1, 1>>>();
  (void)cudaDeviceSynchronize();
}

}  // namespace infemeral
