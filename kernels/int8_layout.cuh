// Where the int8 copy's pieces lie: kernels/int8_head.h says in words.
#pragma once

#include "kernels/common.cuh"
#include "kernels/layout.h"

namespace infemeral::cuda {

inline constexpr int kTileRows = 16;
inline constexpr int kBlockBytes = kTileRows * kAlign;
inline constexpr int kChunkBlocks = 4;  // blocks of kAlign columns in a chunk of a tile
inline constexpr int kTileBytes = kChunkBlocks * kBlockBytes;

// Tiles of the whole copy.
__device__ inline int tiles_of(int vocab_size) {
  return static_cast<int>(int8_rows(vocab_size)) / kTileRows;
}

// Where a chunk of a tile lies, and how many blocks it has.
struct Chunk {
  std::size_t offset;
  int blocks;
};
__device__ inline Chunk chunk_at(int chunk, int tile, int tiles, int stride) {
  const int blocks = min(kChunkBlocks, stride / kAlign - chunk * kChunkBlocks);
  return {static_cast<std::size_t>(chunk) * tiles * kTileBytes +
              static_cast<std::size_t>(tile) * blocks * kBlockBytes,
          blocks};
}

// Where 16 columns from `column` on of row `row` lie in the copy.
__device__ inline std::size_t copy_offset(int row, int column, int tiles, int stride) {
  const int block = column / kAlign, r = row % kTileRows;
  const Chunk chunk = chunk_at(block / kChunkBlocks, row / kTileRows, tiles, stride);
  return chunk.offset + block % kChunkBlocks * kBlockBytes + r / 8 * (kBlockBytes / 2) +
         (r % 8 * 4 + column / 16 % 4) * 16;
}

}  // namespace infemeral::cuda
