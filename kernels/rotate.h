// Products with the cloak: x Q for what goes out, y Q^T for what comes back.
//
// On tensor cores, in float16 with float32 sums. A state is split in two float16 planes,
// 2^e x = high + low, which keeps 22 bits of its largest values: what float32 keeps but for
// rounding. Prompts go this way too, kMaxRows at a time: cuBLAS's product of 100 rows takes a third
// of the time (19 of 57 us at 4,096 on an H200), but its sums are 2^-23.7 off, and a fifth of them
// would have to be summed again (engine/wire_edges.h), for 250 us.
#pragma once

#include <cuda_fp16.h>

#include "kernels/layout.h"
#include "kernels/stage.h"

namespace infemeral::cuda {

// States as planes.
struct Split {
  std::byte* planes = nullptr;  // plane_bytes(n, 2 * stride)
  float* units = nullptr;       // n: 2^-e
};

struct SplitStates {
  const float* states = nullptr;  // n x stride
  int n = 0;
  int stride = 0;
  Split out;
};
cudaError_t split_states(const Stage& stage, const SplitStates& args);

// A square matrix in the order in which it is read: tiles of 16 rows, in them blocks of 32 columns,
// in them rows 0-7, then rows 8-15, each as the 32 lanes of kernels/layout.h. Rows and columns are
// padded with zeros.
inline constexpr std::size_t packed_size(int size) {  // in values
  return static_cast<std::size_t>((size + 15) / 16 * 16) * padded(size);
}
// `in` is size x padded(size), row-major; `transposed` packs its transpose.
cudaError_t pack_matrix(const Stage& stage, const __half* in, int size, bool transposed,
                        __half* out);

// out[s][i] = (add[s][i] + sign * matrix[i] . states[s]) * gain[i]
struct Rotate {
  const __half* matrix = nullptr;  // packed
  int rows = 0;
  int stride = 0;
  Split states;
  int n = 0;
  // How far sums are from exact ones, in the mean, at 4,096 columns: 2^-29 of |state| instead of
  // 2^-26.5. Takes a tenth longer where states are many.
  bool fine = false;
  float* out = nullptr;        // n x stride
  const float* add = nullptr;  // n x stride; nullptr: 0
  float sign = 1;
  const float* gain = nullptr;            // rows; nullptr: 1
  unsigned long long* started = nullptr;  // receives the device time at which it begins
};
// Bits of an output depend on its row and its state alone.
cudaError_t rotate(const Stage& stage, const Rotate& args);

}  // namespace infemeral::cuda
