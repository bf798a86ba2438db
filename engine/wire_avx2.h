// The conversions of engine/wire.cpp with the instructions of AVX2 and F16C, bit for bit the same
// except for the payloads of NaNs. Used by wire.cpp alone.
#pragma once

#include <cstddef>

namespace infemeral {

bool wire_avx2_available();  // on this processor; else none of the others may be called

// Of the first elements, as many as fit whole registers or blocks: how many they were.
std::size_t encode_f16_avx2(const float* row, std::size_t cols, std::byte* out);
std::size_t decode_f16_avx2(const std::byte* in, std::size_t cols, float* row);

// One block of kI8Block values: the largest magnitude, NaNs left out; and the values times
// `inverse`, cut to +-127 and rounded to nearest even, NaNs as 0.
float max_magnitude_avx2(const float* block);
void quantize_block_avx2(const float* block, float inverse, std::byte* out);

}  // namespace infemeral
