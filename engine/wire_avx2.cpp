#include "engine/wire_avx2.h"

#include "engine/wire.h"

#if defined(__x86_64__)

#include <cpuid.h>
#include <immintrin.h>

namespace infemeral {
namespace {

// Not by compiler options for the whole file: what it includes must not come out in instructions
// that another file's copy, which the linker may drop for this one, does not need.
#define INFEMERAL_AVX2 __attribute__((target("avx2,f16c")))

static_assert(kI8Block == 64);

// Not every compiler's __builtin_cpu_supports knows F16C.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}

}  // namespace

bool wire_avx2_available() {
  static const bool available = __builtin_cpu_supports("avx2") && has_f16c();
  return available;
}

INFEMERAL_AVX2 std::size_t encode_f16_avx2(const float* row, std::size_t cols, std::byte* out) {
  const __m256 most = _mm256_set1_ps(65504.0f), least = _mm256_set1_ps(-65504.0f);
  std::size_t j = 0;
  for (; j + 8 <= cols; j += 8) {
    const __m256 x = _mm256_loadu_ps(row + j);
    // Either comparison gives its second operand for a NaN.
    const __m256 clamped = _mm256_max_ps(least, _mm256_min_ps(most, x));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 2 * j),
                     _mm256_cvtps_ph(clamped, _MM_FROUND_TO_NEAREST_INT));
  }
  return j;
}

INFEMERAL_AVX2 std::size_t decode_f16_avx2(const std::byte* in, std::size_t cols, float* row) {
  std::size_t j = 0;
  for (; j + 8 <= cols; j += 8) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + 2 * j));
    _mm256_storeu_ps(row + j, _mm256_cvtph_ps(halves));
  }
  return j;
}

INFEMERAL_AVX2 float max_magnitude_avx2(const float* block) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  __m256 most = _mm256_setzero_ps();
  for (std::size_t j = 0; j < kI8Block; j += 8) {
    // A NaN gives the second operand.
    most = _mm256_max_ps(_mm256_andnot_ps(sign, _mm256_loadu_ps(block + j)), most);
  }
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(most), _mm256_extractf128_ps(most, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

INFEMERAL_AVX2 void quantize_block_avx2(const float* block, float inverse, std::byte* out) {
  const __m256 most = _mm256_set1_ps(127.0f), least = _mm256_set1_ps(-127.0f);
  const __m256 factor = _mm256_set1_ps(inverse);
  for (std::size_t j = 0; j < kI8Block; j += 32) {
    __m256i whole[4];
    for (std::size_t k = 0; k < 4; ++k) {
      const __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(block + j + 8 * k), factor);
      const __m256 number = _mm256_and_ps(scaled, _mm256_cmp_ps(scaled, scaled, _CMP_ORD_Q));
      whole[k] = _mm256_cvtps_epi32(_mm256_max_ps(least, _mm256_min_ps(most, number)));
    }
    // The packs work within halves of registers and leave groups of four in the order 0 2 4 6 1 3 5
    // 7.
    const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(whole[0], whole[1]),
                                              _mm256_packs_epi32(whole[2], whole[3]));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + j),
                        _mm256_permutevar8x32_epi32(packed, order));
  }
}

}  // namespace infemeral

#else

namespace infemeral {

bool wire_avx2_available() {
  return false;
}
std::size_t encode_f16_avx2(const float*, std::size_t, std::byte*) {
  return 0;
}
std::size_t decode_f16_avx2(const std::byte*, std::size_t, float*) {
  return 0;
}
float max_magnitude_avx2(const float*) {
  return 0;
}
void quantize_block_avx2(const float*, float, std::byte*) {}

}  // namespace infemeral

#endif
