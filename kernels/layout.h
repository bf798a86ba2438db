// How matrices lie on the device.
//
// Rows of vectors and row-major matrices begin a multiple of kAlign elements apart (the stride),
// zeros in between.
//
// States lie once more as planes, in the order in which tensor cores take the second operand of
// mma.m16n8k*: the two planes of up to four states are the eight columns of a group. A block of
// columns (kAlign bytes of a plane: 64 int8 or 32 float16 values) is, for each group, 32 lanes of
// 16 bytes, where lane 4 c + t holds bytes 16 t .. 16 t + 15 of column c's part. The first
// operand's rows are cut the same way, so that what a lane loads in 16 bytes feeds two mma
// instructions. They sum products over the values, whose order does not matter as long as both
// operands have the same.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "kernels/head_types.h"

namespace infemeral::cuda {

inline constexpr int kAlign = 64;
inline constexpr int padded(int size) {
  return (size + kAlign - 1) / kAlign * kAlign;
}

// The int8 copy of lm_head comes in groups of this many rows, and so do rows of scores.
inline constexpr int kGroupRows = 128;
inline constexpr std::size_t int8_rows(std::size_t vocab_size) {
  return (vocab_size + kGroupRows - 1) / kGroupRows * kGroupRows;
}
inline constexpr std::size_t score_stride(std::size_t vocab_size) {
  return int8_rows(vocab_size);
}

// Column groups that n states take: a power of two, so that there are few kernels.
inline constexpr int column_groups(int n) {
  return n <= 4 ? 1 : n <= 8 ? 2 : n <= 16 ? 4 : 8;
}

// Bytes of the planes of n states of `row_bytes` a plane.
inline constexpr std::size_t plane_bytes(int n, std::size_t row_bytes) {
  return 8 * column_groups(n) * row_bytes;
}

// Where byte `byte` of plane 0 or 1 of state s lies.
inline constexpr std::size_t plane_offset(int groups, int s, int plane, int byte) {
  return (static_cast<std::size_t>(byte / kAlign * groups + s / 4) * 32 + (s % 4 * 2 + plane) * 4 +
          byte / 16 % 4) *
             16 +
         byte % 16;
}

// The same for int8 planes that a warpgroup multiplies with (kernels/warpgroup.cuh): of a block of
// columns, for each of the two instructions that a lane's 16 bytes of rows feed, matrices of 8
// columns x 16 bytes; first those of the lower halves of what the instruction takes from the lanes.
inline constexpr std::size_t warpgroup_plane_offset(int groups, int s, int plane, int byte) {
  const int in_block = byte % kAlign;
  const int lane = in_block / 16, instruction = in_block % 16 / 8, half = in_block % 8 / 4;
  return (static_cast<std::size_t>(byte / kAlign * 4 + instruction * 2 + half) * groups + s / 4) *
             128 +
         (s % 4 * 2 + plane) * 16 + lane * 4 + byte % 4;
}

}  // namespace infemeral::cuda
