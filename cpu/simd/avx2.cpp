// AVX2 with FMA and F16C: 8 lanes.
#include <immintrin.h>

#include "cpu/simd/kernels.h"

namespace infemeral::simd {
namespace {

using Vec = __m256;
constexpr size_t kLanes = 8;
constexpr size_t kTileRows = 3;              // 12 accumulators, 3 rows of A, 1 of W: 16 registers
constexpr size_t kStreamBytes = ~size_t{0};  // never: one row is too long a chain

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

inline Vec widen_i8(__m128i bytes) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}
inline Vec load(const int8_t* p) {
  return widen_i8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
inline Vec load(const int8_t* p, size_t n) {
  alignas(16) int8_t buffer[2 * kLanes] = {};
  __builtin_memcpy(buffer, p, n);
  return widen_i8(_mm_load_si128(reinterpret_cast<const __m128i*>(buffer)));
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

inline void store_bytes(int8_t* p, Vec v) {
  const __m256i whole = _mm256_cvtps_epi32(v);
  const __m128i words =
      _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
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

// A lane of a Sum takes 512 products in a block: 512 * 127 * 32639 < 2^31.
constexpr size_t kDotStep = 32, kDotBlock = 4096, kDotRows = 4, kDotStates = 1;
constexpr int64_t kDotOffset = 0;
using Sum = __m256i;
struct Weights {
  __m256i part[2];
};
using State = Weights;

inline __m256i widen_bytes(const int8_t* w) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
}
inline __m256i load_words(const int16_t* y) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(y));
}
inline Weights load_weights(const int8_t* w) {
  return {{widen_bytes(w), widen_bytes(w + 16)}};
}
inline Weights load_weights(const int8_t* w, size_t n) {
  int8_t buffer[kDotStep] = {};
  __builtin_memcpy(buffer, w, n);
  return load_weights(buffer);
}
inline State load_state(const WholeState& s, size_t i) {
  return {{load_words(s.values + i), load_words(s.values + i + 16)}};
}
inline State load_state(const WholeState& s, size_t i, size_t n) {
  int16_t buffer[kDotStep] = {};
  __builtin_memcpy(buffer, s.values + i, n * sizeof(int16_t));
  return {{load_words(buffer), load_words(buffer + 16)}};
}
inline Sum no_sum() {
  return _mm256_setzero_si256();
}
inline Sum add_product(Sum sum, const Weights& w, const State& y) {
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(w.part[0], y.part[0]));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(w.part[1], y.part[1]));
}
inline int64_t total(Sum sum) {
  const __m256i s = _mm256_add_epi64(_mm256_cvtepi32_epi64(_mm256_castsi256_si128(sum)),
                                     _mm256_cvtepi32_epi64(_mm256_extracti128_si256(sum, 1)));
  const __m128i t = _mm_add_epi64(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
  return _mm_extract_epi64(t, 0) + _mm_extract_epi64(t, 1);
}

#include "cpu/simd/dot_i8_inl.h"

#include "cpu/simd/kernels_inl.h"

}  // namespace

extern const Kernels kAvx2Kernels;
const Kernels kAvx2Kernels = table("avx2");

}  // namespace infemeral::simd
