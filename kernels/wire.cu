#include "kernels/wire.h"

#include <curand_kernel.h>

#include "kernels/common.cuh"
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

__device__ void widen(const uint4& halves, float (&x)[8]) {
  __half2 pairs[4];
  memcpy(pairs, &halves, sizeof pairs);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float2 pair = __half22float2(pairs[j]);
    x[2 * j] = pair.x;
    x[2 * j + 1] = pair.y;
  }
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
    if (p.out != nullptr) {
      const std::size_t at = static_cast<std::size_t>(blockIdx.x) * p.stride + c;
      *reinterpret_cast<uint4*>(p.out + at) = values;
    } else {
      float x[8];
      widen(values, x);
      write_split(p.split, column_groups(gridDim.x), blockIdx.x, c, x, 1);
    }
  }
  if (p.out == nullptr && threadIdx.x == 0) p.split.units[blockIdx.x] = 1;
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

// One warp takes one block of the i8 format.
__device__ void encode_i8(const float* in, int cols, std::byte* row) {
  const int size = static_cast<int>(kI8Block);
  const int blocks = (cols + size - 1) / size;
  const int lane = threadIdx.x % kWarp;
  for (int b = threadIdx.x / kWarp; b < blocks; b += blockDim.x / kWarp) {
    float x[2], largest = 0;
    for (int j = 0; j < 2; ++j) {
      const int i = b * size + j * kWarp + lane;
      x[j] = i < cols ? in[i] : 0;
      largest = fmaxf(largest, fabsf(x[j]));
    }
    largest = warp_reduce(largest, Max());
    const __half half_scale = half_clamped(largest / 127.0f);
    if (lane == 0) memcpy(row + 2 * b, &half_scale, 2);
    const float scale = __half2float(half_scale);
    const float inverse = scale > 0 ? 1.0f / scale : 0.0f;
    for (int j = 0; j < 2; ++j) {
      const int i = b * size + j * kWarp + lane;
      const float scaled = fminf(fmaxf(x[j] * inverse, -127.0f), 127.0f);
      const int q = isnan(x[j]) ? 0 : __float2int_rn(scaled);
      if (i < cols) row[2 * blocks + i] = static_cast<std::byte>(q);
    }
  }
}

// One block a row. Pairs of float16 make one store: fewer, larger writes over the bus.
__global__ void __launch_bounds__(1024) encode_kernel(Encode p) {
  let_next_start();
  wait_for_previous();
  const float* in = p.in + static_cast<std::size_t>(blockIdx.x) * p.stride;
  std::byte* row = p.wire + blockIdx.x * row_bytes(p.dtype, p.hidden_size);
  const int cols = p.hidden_size;
  switch (p.dtype) {
    case WireDtype::kF32:
      for (int i = threadIdx.x; i < cols; i += blockDim.x) memcpy(row + 4 * i, in + i, 4);
      break;
    case WireDtype::kF16:
      if (cols % 2 == 0) {
        auto* pairs = reinterpret_cast<__half2*>(row);
        for (int i = threadIdx.x; i < cols / 2; i += blockDim.x) {
          pairs[i] = __halves2half2(half_clamped(in[2 * i]), half_clamped(in[2 * i + 1]));
        }
      } else {
        auto* halves = reinterpret_cast<__half*>(row);
        for (int i = threadIdx.x; i < cols; i += blockDim.x) halves[i] = half_clamped(in[i]);
      }
      break;
    case WireDtype::kI8:
      encode_i8(in, cols, row);
      break;
  }
  __threadfence_system();
  __syncthreads();
  if (threadIdx.x != 0) return;
  if (atomicAdd(p.finished, 1u) + 1 != gridDim.x) return;
  *p.finished = 0;
  __threadfence_system();
  *static_cast<volatile std::uint32_t*>(p.done) = *p.sequence;
}

}  // namespace

cudaError_t decode(const Stage& stage, const Decode& args) {
  return launch(stage, {dim3(args.states), dim3(kRowThreads)}, decode_kernel, args);
}

cudaError_t embed(const Stage& stage, const Embed& args) {
  return launch(stage, {dim3(args.rows), dim3(args.out == nullptr ? kRowThreads : 128)},
                embed_kernel, args);
}

cudaError_t add_noise(const Stage& stage, const AddNoise& args) {
  return launch(stage, {dim3(args.n), dim3(kRowThreads)}, noise_kernel, args);
}

cudaError_t encode(const Stage& stage, const Encode& args) {
  return launch(stage, {dim3(args.rows), dim3(args.rows > 8 ? 256 : 1024)}, encode_kernel, args);
}

}  // namespace infemeral::cuda
