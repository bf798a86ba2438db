#include "kernels/wire.h"

#include <curand_kernel.h>

#include "engine/wire_edges.h"
#include "kernels/common.cuh"
#include "kernels/exact_dot.cuh"
#include "kernels/launch.cuh"
#include "kernels/split.cuh"

namespace infemeral::cuda {
namespace {

constexpr int kRowThreads = 512;
constexpr float kMaxF16 = 65504.0f;

__device__ std::size_t row_bytes(WireDtype dtype, int cols) {
  const std::size_t n = cols;
  switch (dtype) {
    case WireDtype::kF32:
      return 4 * n;
    case WireDtype::kF16:
      return 2 * n;
    case WireDtype::kI8:
      return 2 * ((n + kI8Block - 1) / kI8Block) + n;
  }
  return 0;
}

__device__ __half half_clamped(float x) {
  return __float2half_rn(isnan(x) ? x : fminf(fmaxf(x, -kMaxF16), kMaxF16));
}

// Rows of the wire begin at any byte when hidden_size is odd.
template <typename T>
__device__ T load_bytes(const std::byte* p) {
  T value;
  memcpy(&value, p, sizeof value);
  return value;
}

__device__ float wire_value(WireDtype dtype, const std::byte* row, int cols, int i) {
  switch (dtype) {
    case WireDtype::kF32:
      return load_bytes<float>(row + 4 * i);
    case WireDtype::kF16:
      return __half2float(load_bytes<__half>(row + 2 * i));
    case WireDtype::kI8: {
      const int size = static_cast<int>(kI8Block), blocks = (cols + size - 1) / size;
      const auto scale = load_bytes<__half>(row + 2 * (i / size));
      return __half2float(scale) *
             static_cast<float>(static_cast<signed char>(row[2 * blocks + i]));
    }
  }
  return 0;
}

// Eight values of a row of the wire from column c on, zeros beyond its end. One load over the bus
// where the format allows it.
__device__ void load_wire(WireDtype dtype, const std::byte* row, int cols, int c, float (&x)[8]) {
  const std::byte* p = row + 2 * c;
  if (dtype == WireDtype::kF16 && c + 8 <= cols && reinterpret_cast<std::uintptr_t>(p) % 16 == 0) {
    widen(*reinterpret_cast<const uint4*>(p), x);
    return;
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) x[j] = c + j < cols ? wire_value(dtype, row, cols, c + j) : 0.0f;
}

// One block a row. A thread keeps its values from the bus to the planes; of rows longer than that
// it reads the rest again.
__global__ void __launch_bounds__(kRowThreads) decode_kernel(Decode p) {
  constexpr int kKept = 2, kStep = kRowThreads * 8;
  constexpr int kWords = sizeof(RowRequest) / 4;
  static_assert(sizeof(RowRequest) % 4 == 0 && kWords <= kWarp);
  __shared__ std::uint32_t request_words[kWords];
  let_next_start();
  wait_for_previous();
  const unsigned long long start = global_ns();
  const int s = blockIdx.x;
  RowState& state = p.rows[s];
  const std::byte* row = p.wire + s * row_bytes(p.dtype, p.hidden_size);
  float* out = p.out + static_cast<std::size_t>(s) * p.stride;
  // Both loads over the bus at once.
  float kept[kKept][8];
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    const int c = threadIdx.x * 8 + k * kStep;
    if (c < p.stride) load_wire(p.dtype, row, p.hidden_size, c, kept[k]);
  }
  if (threadIdx.x < kWords) {
    request_words[threadIdx.x] =
        reinterpret_cast<const std::uint32_t*>(p.requests + s)[threadIdx.x];
  }
  for (int b = threadIdx.x; b < kBins; b += kRowThreads) state.lower_ends[b] = 0;

  bool finite = true;
  float largest = 0;
  const auto look = [&](int c, const float(&x)[8]) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      finite = finite && isfinite(x[j]);
      largest = fmaxf(largest, fabsf(x[j]));
    }
    auto* to = reinterpret_cast<float4*>(out + c);
    to[0] = make_float4(x[0], x[1], x[2], x[3]);
    to[1] = make_float4(x[4], x[5], x[6], x[7]);
  };
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    const int c = threadIdx.x * 8 + k * kStep;
    if (c < p.stride) look(c, kept[k]);
  }
  for (int c = threadIdx.x * 8 + kKept * kStep; c < p.stride; c += kStep) {
    float x[8];
    load_wire(p.dtype, row, p.hidden_size, c, x);
    look(c, x);
  }
  finite = __syncthreads_and(finite);
  const float scale = split_scale(block_reduce(largest, 0.0f, Max()));
  const int groups = column_groups(p.states);
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    const int c = threadIdx.x * 8 + k * kStep;
    if (c < p.stride) write_split(p.split, groups, s, c, kept[k], scale);
  }
  for (int c = threadIdx.x * 8 + kKept * kStep; c < p.stride; c += kStep) {
    float x[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) x[j] = out[c + j];
    write_split(p.split, groups, s, c, x, scale);
  }
  RowRequest request;
  memcpy(&request, request_words, sizeof request);
  if (request.repetition_penalty != 1) {
    const std::size_t base = static_cast<std::size_t>(s) * p.seen_words;
    for (int i = threadIdx.x; i < p.seen_words; i += kRowThreads) {
      p.seen_copy[base + i] = p.seen[base + i];
    }
  }
  if (threadIdx.x == 0) {
    p.split.units[s] = 1 / scale;
    state.request = request;
    state.times = {};
    state.times.decode = start;
    state.finite = finite;
    state.covered = 0;
    state.top = 0;
    state.claimed = 0;
    state.candidates = 0;
    state.rest_mass = 0;
    state.rest_ceiling = 0;
    state.blocks_done = 0;
    state.best = 0;
  }
}

__global__ void __launch_bounds__(kRowThreads) embed_kernel(Embed p) {
  let_next_start();
  wait_for_previous();
  const bool leads = blockIdx.x == 0 && threadIdx.x == 0;
  if (leads && p.times != nullptr) p.times[0] = global_ns();
  const std::int32_t id = p.ids[blockIdx.x];
  const bool valid = id >= 0 && id < p.vocab_size;
  const __half* row = p.table + static_cast<std::size_t>(valid ? id : 0) * p.stride;
  for (int c = threadIdx.x * 8; c < p.stride; c += blockDim.x * 8) {
    const uint4 values = *reinterpret_cast<const uint4*>(row + c);
    const std::size_t at = static_cast<std::size_t>(blockIdx.x) * p.stride + c;
    *reinterpret_cast<uint4*>(p.out + at) = values;
    float x[8];
    widen(values, x);
    write_split(p.split, column_groups(gridDim.x), blockIdx.x, c, x, 1);
  }
  if (threadIdx.x == 0) p.split.units[blockIdx.x] = 1;
  if (leads && p.times != nullptr) p.times[1] = global_ns();
}

// One block a row.
__global__ void __launch_bounds__(kRowThreads) noise_kernel(AddNoise p) {
  let_next_start();
  wait_for_previous();
  float* row = p.rows + static_cast<std::size_t>(blockIdx.x) * p.stride;
  float squares = 0;
  for (int i = threadIdx.x; i < p.hidden_size; i += blockDim.x) squares += row[i] * row[i];
  squares = block_reduce(squares, 0.0f, Sum());
  const float scale = p.level * sqrtf(squares / p.hidden_size);
  for (int i = threadIdx.x * 4; i < p.hidden_size; i += blockDim.x * 4) {
    const uint4 words = curand_Philox4x32_10(
        make_uint4(i / 4, 0, *p.sequence, blockIdx.x),
        make_uint2(static_cast<unsigned>(p.key), static_cast<unsigned>(p.key >> 32)));
    const float2 a = _curand_box_muller(words.x, words.y), b = _curand_box_muller(words.z, words.w);
    const float noise[4] = {a.x, a.y, b.x, b.y};
    for (int j = 0; j < 4 && i + j < p.hidden_size; ++j) row[i + j] += scale * noise[j];
  }
}

// A block of threads takes a part of a row: a small one of few rows, so that they keep many
// multiprocessors busy, or else a larger one. Parts are made of whole blocks of the i8 format.
constexpr int kEncodeThreads = 256;
constexpr int kManyEncodedRows = 8;
constexpr int kSmallPart = 64, kPart = 1024;
constexpr int kI8Size = static_cast<int>(kI8Block);
static_assert(kI8Size == 2 * kWarp && kSmallPart % kI8Size == 0 && kPart % kI8Size == 0);

// One warp's block of the i8 format: its scale, and the lane's two values.
struct I8Values {
  int first;  // column of the part
  float x[2];
  float largest, inverse;
  __half scale;

  __device__ I8Values(const float* part, int size, int block)
      : first(block * kI8Size + static_cast<int>(threadIdx.x) % kWarp), largest(0) {
    for (int j = 0; j < 2; ++j) {
      const int i = first + j * kWarp;
      x[j] = i < size ? part[i] : 0;
      largest = fmaxf(largest, fabsf(x[j]));
    }
    largest = warp_reduce(largest, Max());
    scale = half_clamped(largest / 127.0f);
    const float step = __half2float(scale);
    inverse = step > 0 ? 1.0f / step : 0.0f;
  }
};

// visit(block) for the warp's blocks.
template <typename Visit>
__device__ void for_i8_blocks(const float* part, int size, const Visit& visit) {
  const int warp = threadIdx.x / kWarp;
  for (int b = warp; b < (size + kI8Size - 1) / kI8Size; b += kEncodeThreads / kWarp) {
    visit(I8Values(part, size, b));
  }
}

// Values of a part of a row that engine/wire_edges.h wants to be exact.
__device__ void sum_edges_exactly(const Encode& p, int row, int first, int size, float* part) {
  constexpr int kWarps = kEncodeThreads / kWarp, kTeamWarps = 2;  // a team takes a value at a time
  constexpr int kTeams = kWarps / kTeamWarps;
  __shared__ unsigned short edges[kPart];
  __shared__ double sums[kWarps];
  __shared__ int n_edges;
  const int warp = threadIdx.x / kWarp;
  const __half* const plain = p.plain + static_cast<std::size_t>(row) * p.stride;
  // |plain|, from the mean square of what it was rotated to: at least as many values as a small
  // part has.
  const float* const in = p.in + static_cast<std::size_t>(row) * p.stride;
  const int end = first + size, begin = max(0, min(first, end - kSmallPart));
  float squares = 0;
  for (int i = begin + threadIdx.x; i < end; i += kEncodeThreads) squares += in[i] * in[i];
  squares = block_reduce(squares, 0.0f, Sum());
  const float error =
      p.sum_error * sqrtf(squares * p.hidden_size / static_cast<float>(end - begin));

  const auto note = [&](int i) { edges[atomicAdd(&n_edges, 1)] = static_cast<unsigned short>(i); };
  const auto find_edges = [&](bool of_scales) {
    if (p.dtype != WireDtype::kI8) {
      for (int i = threadIdx.x; i < size; i += kEncodeThreads) {
        if (p.dtype == WireDtype::kF32 || near_f16_edge(part[i], error)) note(i);
      }
      return;
    }
    for_i8_blocks(part, size, [&](const I8Values& block) {
      if (of_scales && !near_scale_edge(block.largest, error)) return;
      for (int j = 0; j < 2; ++j) {
        const int i = block.first + j * kWarp;
        const bool near_edge = of_scales ? can_be_largest(block.x[j], block.largest, error)
                                         : near_i8_edge(block.x[j], block.inverse, error);
        if (i < size && near_edge) note(i);
      }
    });
  };
  // What the scales of i8 blocks hang on comes before the codes.
#pragma unroll 1
  for (bool of_scales = p.dtype == WireDtype::kI8;; of_scales = false) {
    __syncthreads();  // all have seen how many there were before
    if (threadIdx.x == 0) n_edges = 0;
    __syncthreads();
    find_edges(of_scales);
    __syncthreads();
#pragma unroll 1
    for (int e = 0; e < n_edges; e += kTeams) {
      const int own = e + warp / kTeamWarps;
      if (own < n_edges) {
        const double sum =
            exact_dot<kTeamWarps>(p.matrix, first + edges[own], plain, p.stride, warp % kTeamWarps);
        if (threadIdx.x % kWarp == 0) sums[warp] = sum;
      }
      __syncthreads();
      if (threadIdx.x < kTeams && e + static_cast<int>(threadIdx.x) < n_edges) {
        double sum = 0;
        for (int share = 0; share < kTeamWarps; ++share) {
          sum += sums[threadIdx.x * kTeamWarps + share];
        }
        part[edges[e + threadIdx.x]] = static_cast<float>(sum);
      }
      __syncthreads();
    }
    if (!of_scales) return;
  }
}

__global__ void __launch_bounds__(kEncodeThreads) encode_kernel(Encode p, int part_size) {
  __shared__ float part[kPart];
  let_next_start();
  wait_for_previous();
  const int cols = p.hidden_size, row = blockIdx.y, first = blockIdx.x * part_size;
  const int size = min(part_size, cols - first);
  const float* in = p.in + static_cast<std::size_t>(row) * p.stride + first;
  for (int i = threadIdx.x; i < size; i += kEncodeThreads) part[i] = in[i];
  __syncthreads();
  if (p.matrix != nullptr) sum_edges_exactly(p, row, first, size, part);
  std::byte* out = p.wire + row * row_bytes(p.dtype, cols);
  switch (p.dtype) {
    case WireDtype::kF32:
      for (int i = threadIdx.x; i < size; i += kEncodeThreads) {
        memcpy(out + 4 * (first + i), part + i, 4);
      }
      break;
    case WireDtype::kF16:
      if (cols % 2 == 0) {  // pairs make one store: fewer, larger writes over the bus
        auto* pairs = reinterpret_cast<__half2*>(out) + first / 2;
        for (int i = threadIdx.x; i < size / 2; i += kEncodeThreads) {
          pairs[i] = __halves2half2(half_clamped(part[2 * i]), half_clamped(part[2 * i + 1]));
        }
      } else {
        auto* halves = reinterpret_cast<__half*>(out) + first;
        for (int i = threadIdx.x; i < size; i += kEncodeThreads) halves[i] = half_clamped(part[i]);
      }
      break;
    case WireDtype::kI8: {
      std::byte* const scales = out + 2 * (first / kI8Size);
      std::byte* const codes = out + 2 * ((cols + kI8Size - 1) / kI8Size) + first;
      for_i8_blocks(part, size, [&](const I8Values& block) {
        if (threadIdx.x % kWarp == 0) memcpy(scales + 2 * (block.first / kI8Size), &block.scale, 2);
        for (int j = 0; j < 2; ++j) {
          const int i = block.first + j * kWarp;
          const float steps = fminf(fmaxf(block.x[j] * block.inverse, -127.0f), 127.0f);
          if (i < size) {
            codes[i] = static_cast<std::byte>(isnan(block.x[j]) ? 0 : __float2int_rn(steps));
          }
        }
      });
      break;
    }
  }
  __threadfence_system();
  __syncthreads();
  if (threadIdx.x != 0) return;
  if (atomicAdd(p.finished, 1u) + 1 != gridDim.x * gridDim.y) return;
  *p.finished = 0;
  __threadfence_system();
  *static_cast<volatile std::uint32_t*>(p.done) = *p.sequence;
}

}  // namespace

cudaError_t decode(const Stage& stage, const Decode& args) {
  return launch(stage, {dim3(args.states), dim3(kRowThreads)}, decode_kernel, args);
}

cudaError_t embed(const Stage& stage, const Embed& args) {
  return launch(stage, {dim3(args.rows), dim3(kRowThreads)}, embed_kernel, args);
}

cudaError_t add_noise(const Stage& stage, const AddNoise& args) {
  return launch(stage, {dim3(args.n), dim3(kRowThreads)}, noise_kernel, args);
}

cudaError_t encode(const Stage& stage, const Encode& args) {
  const int part = args.rows > kManyEncodedRows ? kPart : kSmallPart;
  return launch(stage,
                {dim3((args.hidden_size + part - 1) / part, args.rows), dim3(kEncodeThreads)},
                encode_kernel, args, part);
}

}  // namespace infemeral::cuda
