// AVX2 with FMA and F16C: 8 lanes.
#include <immintrin.h>

#include "cpu/simd/kernels.h"

namespace infemeral::simd {
namespace {

using Vec = __m256;
constexpr size_t kLanes = 8;
constexpr size_t kTileRows = 3;  // 12 accumulators, 3 rows of A, 1 of W: 16 registers

struct F16 {
  uint16_t bits;
};
struct BF16 {
  uint16_t bits;
};

inline __m256i first(size_t n) {
  const __m256i lanes = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lanes);
}
// The first n of eight 16-bit elements, zeros after them: AVX2 has no masked load of that width.
inline __m128i load_halves(const void* p, size_t n) {
  alignas(16) uint16_t buffer[kLanes] = {};
  __builtin_memcpy(buffer, p, n * sizeof(uint16_t));
  return _mm_load_si128(reinterpret_cast<const __m128i*>(buffer));
}
inline __m128i load_halves(const void* p) {
  return _mm_loadu_si128(static_cast<const __m128i*>(p));
}

inline Vec zero() {
  return _mm256_setzero_ps();
}
inline Vec broadcast(float x) {
  return _mm256_set1_ps(x);
}

inline Vec load(const float* p) {
  return _mm256_loadu_ps(p);
}
inline Vec load(const float* p, size_t n) {
  return _mm256_maskload_ps(p, first(n));
}
inline Vec load(const F16* p) {
  return _mm256_cvtph_ps(load_halves(p));
}
inline Vec load(const F16* p, size_t n) {
  return _mm256_cvtph_ps(load_halves(p, n));
}
inline Vec widen_bf16(__m128i halves) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
inline Vec load(const BF16* p) {
  return widen_bf16(load_halves(p));
}
inline Vec load(const BF16* p, size_t n) {
  return widen_bf16(load_halves(p, n));
}

inline void store(float* p, Vec v) {
  _mm256_storeu_ps(p, v);
}
inline void store(float* p, Vec v, size_t n) {
  _mm256_maskstore_ps(p, first(n), v);
}
inline __m128i narrow(Vec v) {
  return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
}
inline void store(F16* p, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(v));
}
inline void store(F16* p, Vec v, size_t n) {
  alignas(16) uint16_t buffer[kLanes];
  _mm_store_si128(reinterpret_cast<__m128i*>(buffer), narrow(v));
  __builtin_memcpy(p, buffer, n * sizeof(uint16_t));
}

inline Vec fma(Vec a, Vec b, Vec c) {
  return _mm256_fmadd_ps(a, b, c);
}
inline Vec add(Vec a, Vec b) {
  return _mm256_add_ps(a, b);
}
inline Vec sub(Vec a, Vec b) {
  return _mm256_sub_ps(a, b);
}
inline Vec mul(Vec a, Vec b) {
  return _mm256_mul_ps(a, b);
}
inline Vec div(Vec a, Vec b) {
  return _mm256_div_ps(a, b);
}
inline Vec min(Vec limit, Vec x) {
  return _mm256_min_ps(limit, x);
}
inline Vec max(Vec limit, Vec x) {
  return _mm256_max_ps(limit, x);
}
inline float max_lane(Vec v) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

inline Vec round_even(Vec x) {
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline Vec scale_by_pow2(Vec x, Vec n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return mul(x, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}

// Lanes i and i+4, then i+2, i+1, for four vectors side by side.
inline void sum4(float* out, Vec a, Vec b, Vec c, Vec d) {
  const Vec ab = add(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  const Vec cd = add(_mm256_permute2f128_ps(c, d, 0x20), _mm256_permute2f128_ps(c, d, 0x31));
  Vec s = add(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
  s = add(s, _mm256_permute_ps(s, 0xb1));  // a a c c | b b d d
  _mm_storeu_ps(out, _mm_blend_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1), 0xa));
}

inline int32_t dot_block(const int8_t* w, const int16_t* y, size_t n) {
  __m256i sums = _mm256_setzero_si256();
  size_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w + i));
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(y + i));
    sums = _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_cvtepi8_epi16(bytes), halves));
  }
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1));
  int32_t sum = _mm_cvtsi128_si32(s);
  for (; i < n; ++i) sum += w[i] * y[i];
  return sum;
}

#include "cpu/simd/kernels_inl.h"

}  // namespace

extern const Kernels kAvx2Kernels;
const Kernels kAvx2Kernels = table("avx2");

}  // namespace infemeral::simd
