#include "kernels/int8_head.h"
#include "kernels/int8_layout.cuh"
#include "kernels/launch.cuh"
#include "kernels/round_state.cuh"

namespace infemeral::cuda {
namespace {

// --- rows ---

constexpr int kRowWarps = 8;

// A warp a row; a lane takes groups of 16 columns.
__global__ void quantise_rows_kernel(QuantiseRows p) {
  const int lane = threadIdx.x % kWarp;
  const int index = blockIdx.x * kRowWarps + threadIdx.x / kWarp;
  const int filled = (p.count + kGroupRows - 1) / kGroupRows * kGroupRows;
  if (index >= filled) return;
  const bool exists = index < p.count;
  const __half* row = p.rows + static_cast<std::size_t>(exists ? index : 0) * p.stride;
  const int out_row = p.first + index;

  float largest = 0;
  double squares = 0;
  for (int i = lane; i < p.hidden_size && exists; i += kWarp) {
    const float w = __half2float(row[i]);
    largest = fmaxf(largest, fabsf(w));
    squares += static_cast<double>(w) * w;
  }
  largest = warp_reduce(largest, Max());
  squares = warp_reduce(squares, Sum());

  RoundingSums sums;
  sums.norm = norm_up(squares);
  sums.scale = largest / static_cast<float>(kRowMax);
  const bool rounds = exists && sums.norm < HUGE_VALF && sums.scale != 0;
  double error = 0;
  for (int group = lane; group < p.stride / 16; group += kWarp) {
    std::int8_t q[16] = {};
    for (int j = 0; j < 16 && rounds; ++j) {
      const float w = __half2float(row[group * 16 + j]);
      const float whole = whole_steps(w, sums.scale, static_cast<float>(kRowMax));
      const double kept = static_cast<double>(sums.scale) * whole;
      q[j] = static_cast<std::int8_t>(whole);
      error += (w - kept) * (w - kept);
    }
    uint4 bytes;
    memcpy(&bytes, q, sizeof bytes);
    *reinterpret_cast<uint4*>(
        p.copy + copy_offset(out_row, group * 16, tiles_of(p.vocab_size), p.stride)) = bytes;
  }
  error = warp_reduce(error, Sum());
  if (lane != 0) return;
  RowBound bound;
  if (rounds) {
    bound = {sums.scale, norm_up(error), sums.norm};
  } else if (exists) {  // all zero, or not finite, which no state is certifiable with
    const float norm = sums.norm < HUGE_VALF ? sums.norm : HUGE_VALF;
    bound = {0, norm, norm};
  }
  p.bounds[out_row] = bound;
  // Norms are not negative: their bits are in their order.
  atomicMax(reinterpret_cast<unsigned*>(p.largest_norm), __float_as_uint(bound.norm));
}

// --- states ---

constexpr int kStateThreads = 512;

// One block a state.
__global__ void __launch_bounds__(kStateThreads)
    quantise_states_kernel(Product p, bool for_warpgroups) {
  let_next_start();
  wait_for_previous();
  const int s = blockIdx.x, groups = column_groups(p.n);
  RowState& out = p.rows[s];
  if (threadIdx.x == 0) out.times.de_embed = global_ns();
  const auto write = [&](int i, std::byte high, std::byte low) {
    p.planes[for_warpgroups ? warpgroup_plane_offset(groups, s, 0, i)
                            : plane_offset(groups, s, 0, i)] = high;
    p.planes[for_warpgroups ? warpgroup_plane_offset(groups, s, 1, i)
                            : plane_offset(groups, s, 1, i)] = low;
  };
  for (int i = p.hidden_size + threadIdx.x; i < p.stride; i += kStateThreads) {
    write(i, std::byte{0}, std::byte{0});
  }
  StateBound bound;
  const bool covered = round_state<kStateThreads>(p.states + static_cast<std::size_t>(s) * p.stride,
                                                  p.hidden_size, *p.largest_norm, write, bound);
  if (!covered || threadIdx.x != 0) return;  // decode has cleared `covered`
  out.bound = bound;
  out.covered = 1;
}

}  // namespace

cudaError_t quantise_rows(const Stage& stage, const QuantiseRows& args) {
  const int filled = (args.count + kGroupRows - 1) / kGroupRows * kGroupRows;
  quantise_rows_kernel<<<(filled + kRowWarps - 1) / kRowWarps, kRowWarps * kWarp, 0,
                         stage.stream>>>(args);
  return cudaGetLastError();
}

cudaError_t quantise_states(const Stage& stage, const Product& args) {
  return launch(stage, {dim3(args.n), dim3(kStateThreads)}, quantise_states_kernel, args,
                warpgroup_products(stage, args.n));
}

}  // namespace infemeral::cuda
