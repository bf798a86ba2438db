#include "kernels/rotate.h"

#include "kernels/launch.cuh"
#include "kernels/split.cuh"

namespace infemeral::cuda {
namespace {

constexpr int kTileRows = 16;
constexpr int kWarps = 8;          // a block: each takes an eighth of the columns
constexpr int kBlockColumns = 32;  // of float16: kAlign bytes

// A thread a group of eight values: what a lane loads at once.
__global__ void pack_kernel(const __half* in, int size, int stride, bool transposed, __half* out) {
  const std::size_t i = static_cast<std::size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int blocks = stride / kBlockColumns;
  const int lane = i % kWarp, half = i / kWarp % 2;
  const int block = i / (2 * kWarp) % blocks;
  const std::size_t tile = i / (2 * kWarp) / blocks;
  const int row = static_cast<int>(tile) * kTileRows + half * 8 + lane / 4;
  if (static_cast<int>(tile) >= (size + kTileRows - 1) / kTileRows) return;
  __half values[8];
  for (int j = 0; j < 8; ++j) {
    const int column = block * kBlockColumns + lane % 4 * 8 + j;
    const std::size_t at = transposed ? static_cast<std::size_t>(column) * stride + row
                                      : static_cast<std::size_t>(row) * stride + column;
    values[j] = row < size && column < size ? in[at] : __half(0);
  }
  uint4 bits;
  memcpy(&bits, values, sizeof bits);
  reinterpret_cast<uint4*>(out)[i] = bits;
}

__global__ void split_kernel(SplitStates p) {
  let_next_start();
  wait_for_previous();
  const int s = blockIdx.x, groups = column_groups(p.n);
  const float* row = p.states + static_cast<std::size_t>(s) * p.stride;
  float largest = 0;
  for (int i = threadIdx.x; i < p.stride; i += blockDim.x) largest = fmaxf(largest, fabsf(row[i]));
  const float scale = split_scale(block_reduce(largest, 0.0f, Max()));
  for (int c = threadIdx.x * 8; c < p.stride; c += blockDim.x * 8) {
    float x[8];
    for (int j = 0; j < 8; ++j) x[j] = row[c + j];
    write_split(p.out, groups, s, c, x, scale);
  }
  if (threadIdx.x == 0) p.out.units[s] = 1 / scale;
}

// sums += a * b: 16 rows x 16 columns times 16 columns x 8 states' planes.
__device__ void multiply_add(float (&sums)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                             unsigned b0, unsigned b1) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
  const auto half = [&](unsigned x0, unsigned x1, unsigned y) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(x0), "r"(x1), "r"(y));
  };
  half(a0, a1, b0);
  half(a2, a3, b1);
#endif
}

// Not through the read-only path: an earlier kernel may write these while this one already runs.
__device__ uint4 load_plane(const std::byte* p) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}

// A block takes Tiles x 16 rows, a warp an eighth of their columns. For few states it leaves
// registers for the kernels that stand by. Ahead is even. Fine: tensor cores cut off what float32
// cannot hold, always towards zero, so they add up a block's products and rounding additions the
// blocks.
template <int Groups, int Tiles, int Ahead, bool Fine>
__global__ void __launch_bounds__(kWarps* kWarp, Groups == 1 ? 2 : 1) rotate_kernel(Rotate p) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int blocks = p.stride / kBlockColumns;
  const int share = (blocks + kWarps - 1) / kWarps;
  const int begin = min(warp * share, blocks), end = min(begin + share, blocks);
  const int first_row = blockIdx.x * Tiles * kTileRows;
  const int tiles = (p.rows + kTileRows - 1) / kTileRows;
  const __half* rows[Tiles];
#pragma unroll
  for (int tile = 0; tile < Tiles; ++tile) {
    const int index = min(static_cast<int>(blockIdx.x) * Tiles + tile, tiles - 1);
    rows[tile] = p.matrix + static_cast<std::size_t>(index) * kTileRows * p.stride + lane * 8;
  }
  // The matrix does not depend on the kernels before: the first loads leave before those have
  // ended.
  uint4 a[Ahead][Tiles][2];
  const auto load = [&](int block) {
#pragma unroll
    for (int i = 0; i < Ahead; ++i) {
#pragma unroll
      for (int tile = 0; tile < Tiles; ++tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (block + i < end) {
            a[i][tile][half] = load_streaming(rows[tile] + ((block + i) * 2 + half) * kWarp * 8);
          }
        }
      }
    }
  };
  load(begin);
  if constexpr (Groups == 1) {  // and the rest to the L2 cache
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile) {
      const auto* bytes = reinterpret_cast<const char*>(rows[tile] - lane * 8);
      for (int at = (begin + Ahead) * 1024 + lane * 128; at < end * 1024; at += kWarp * 128) {
        prefetch_l2(bytes + at);
      }
    }
    let_next_start();  // its first loads come behind all of these
  }
  wait_for_previous();
  if (p.started != nullptr && blockIdx.x == 0 && threadIdx.x == 0) *p.started = global_ns();

  float sums[Tiles][Groups][4] = {};
  const bool used = 4 * (Groups - 1) + lane / 8 < p.n;  // of the last group's columns
  const auto load_block = [&](int block, uint4(&b)[Groups]) {
#pragma unroll
    for (int g = 0; g < Groups; ++g) {
      b[g] = make_uint4(0, 0, 0, 0);
      if (block < end && (g < Groups - 1 || used)) {
        b[g] = load_plane(p.states.planes +
                          (static_cast<std::size_t>(block * Groups + g) * kWarp + lane) * 16);
      }
    }
  };
  uint4 b[2][Groups];  // the planes' next block is on its way while one is multiplied
  load_block(begin, b[0]);
  for (int block = begin; block < end; block += Ahead) {
#pragma unroll
    for (int i = 0; i < Ahead; ++i) {
      if (block + i >= end) break;
      load_block(block + i + 1, b[(i + 1) % 2]);
#pragma unroll
      for (int g = 0; g < Groups; ++g) {
        const uint4 y = b[i % 2][g];
#pragma unroll
        for (int tile = 0; tile < Tiles; ++tile) {
          const uint4 upper = a[i][tile][0], lower = a[i][tile][1];
          const auto add_block = [&](float(&to)[4]) {
            multiply_add(to, upper.x, lower.x, upper.y, lower.y, y.x, y.y);
            multiply_add(to, upper.z, lower.z, upper.w, lower.w, y.z, y.w);
          };
          if constexpr (Fine) {
            float few[4] = {};
            add_block(few);
#pragma unroll
            for (int j = 0; j < 4; ++j) sums[tile][g][j] += few[j];
          } else {
            add_block(sums[tile][g]);
          }
        }
      }
    }
    load(block + Ahead);
  }
  if constexpr (Groups > 1) let_next_start();  // whose loads would hold these up

  // Warps are added in their order; high and low plane of a state lie side by side.
  __shared__ float partial[kWarps][Tiles][Groups][2][kWarp];
#pragma unroll
  for (int tile = 0; tile < Tiles; ++tile) {
#pragma unroll
    for (int g = 0; g < Groups; ++g) {
      partial[warp][tile][g][0][lane] = sums[tile][g][0] + sums[tile][g][1];
      partial[warp][tile][g][1][lane] = sums[tile][g][2] + sums[tile][g][3];
    }
  }
  __syncthreads();
  constexpr int kOutputs = Tiles * Groups * 2 * kWarp;
  for (int o = threadIdx.x; o < kOutputs; o += blockDim.x) {
    const int l = o % kWarp, half = o / kWarp % 2, g = o / (2 * kWarp) % Groups,
              tile = o / (2 * kWarp * Groups);
    const int s = 4 * g + l % 4, row = first_row + tile * kTileRows + half * 8 + l / 4;
    if (s >= p.n || row >= p.rows) continue;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += partial[w][tile][g][half][l];
    const std::size_t at = static_cast<std::size_t>(s) * p.stride + row;
    float value = p.sign * (sum * p.states.units[s]);
    if (p.add != nullptr) value += p.add[at];
    if (p.gain != nullptr) value *= p.gain[row];
    p.out[at] = value;
  }
}

template <int Groups, int Tiles, int Ahead>
cudaError_t run(const Stage& stage, const Rotate& args) {
  const int rows = Tiles * kTileRows;
  const auto kernel = args.fine ? rotate_kernel<Groups, Tiles, Ahead, true>
                                : rotate_kernel<Groups, Tiles, Ahead, false>;
  return launch(stage, {dim3((args.rows + rows - 1) / rows), dim3(kWarps * kWarp)}, kernel, args);
}

}  // namespace

cudaError_t pack_matrix(const Stage& stage, const __half* in, int size, bool transposed,
                        __half* out) {
  constexpr int kThreads = 256;
  const std::size_t groups = packed_size(size) / 8;
  pack_kernel<<<static_cast<unsigned>((groups + kThreads - 1) / kThreads), kThreads, 0,
                stage.stream>>>(in, size, padded(size), transposed, out);
  return cudaGetLastError();
}

cudaError_t split_states(const Stage& stage, const SplitStates& args) {
  return launch(stage, {dim3(args.n), dim3(512)}, split_kernel, args);
}

cudaError_t rotate(const Stage& stage, const Rotate& args) {
  switch (column_groups(args.n)) {
    case 1:
      return run<1, 1, 4>(stage, args);
    case 2:
      return run<2, 1, 4>(stage, args);
    case 4:
      return run<4, 1, 4>(stage, args);
    default:
      break;
  }
  // Every block reads all planes: the fewer the better, as long as none waits for another's end.
  const int tiles = (args.rows + kTileRows - 1) / kTileRows;
  if (tiles <= stage.multiprocessors) return run<8, 1, 4>(stage, args);
  if (tiles <= 2 * stage.multiprocessors) return run<8, 2, 2>(stage, args);
  return run<8, 3, 2>(stage, args);
}

}  // namespace infemeral::cuda
