// AVX-512 F, BW, VL and DQ: 16 lanes, masked loads and stores for what is left over.
#include <immintrin.h>

#include "cpu/simd/kernels.h"

namespace infemeral::simd {
namespace {

using Vec = __m512;
constexpr size_t kLanes = 16;
constexpr size_t kTileRows = 6;  // 24 accumulators, 6 rows of A, 1 of W: 31 of 32 registers
constexpr size_t kStreamBytes = size_t{1} << 16;

struct F16 {
  uint16_t bits;
};
struct BF16 {
  uint16_t bits;
};

inline __mmask16 first(size_t n) {
  return static_cast<__mmask16>((1u << n) - 1);
}
inline Vec zero() {
  return _mm512_setzero_ps();
}
inline Vec broadcast(float x) {
  return _mm512_set1_ps(x);
}

inline Vec load(const float* p) {
  return _mm512_loadu_ps(p);
}
inline Vec load(const float* p, size_t n) {
  return _mm512_maskz_loadu_ps(first(n), p);
}
inline Vec load(const F16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_epi16(p));
}
inline Vec load(const F16* p, size_t n) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p));
}
inline Vec widen_bf16(__m256i halves) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
inline Vec load(const BF16* p) {
  return widen_bf16(_mm256_loadu_epi16(p));
}
inline Vec load(const BF16* p, size_t n) {
  return widen_bf16(_mm256_maskz_loadu_epi16(first(n), p));
}

inline Vec widen_i8(__m128i bytes) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}
inline Vec load(const int8_t* p) {
  return widen_i8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Vec load(const int8_t* p, size_t n) {
  return widen_i8(_mm_maskz_loadu_epi8(first(n), p));
}

inline void store(float* p, Vec v) {
  _mm512_storeu_ps(p, v);
}
inline void store(float* p, Vec v, size_t n) {
  _mm512_mask_storeu_ps(p, first(n), v);
}
inline __m256i narrow(Vec v) {
  return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline void store(F16* p, Vec v) {
  _mm256_storeu_epi16(p, narrow(v));
}
inline void store(F16* p, Vec v, size_t n) {
  _mm256_mask_storeu_epi16(p, first(n), narrow(v));
}

inline void store_bytes(int8_t* p, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
}

inline Vec fma(Vec a, Vec b, Vec c) {
  return _mm512_fmadd_ps(a, b, c);
}
inline Vec add(Vec a, Vec b) {
  return _mm512_add_ps(a, b);
}
inline Vec sub(Vec a, Vec b) {
  return _mm512_sub_ps(a, b);
}
inline Vec mul(Vec a, Vec b) {
  return _mm512_mul_ps(a, b);
}
inline Vec div(Vec a, Vec b) {
  return _mm512_div_ps(a, b);
}
inline Vec min(Vec limit, Vec x) {
  return _mm512_min_ps(limit, x);
}
inline Vec max(Vec limit, Vec x) {
  return _mm512_max_ps(limit, x);
}
inline float max_lane(Vec v) {
  return _mm512_reduce_max_ps(v);
}

inline Vec round_even(Vec x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline Vec scale_by_pow2(Vec x, Vec n) {
  return _mm512_scalef_ps(x, n);
}

// Lanes i and i+8, then i+4, i+2, i+1, for four vectors side by side.
inline void sum4(float* out, Vec a, Vec b, Vec c, Vec d) {
  const Vec ab = add(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  const Vec cd = add(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
  Vec s = add(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
  s = add(s, _mm512_permute_ps(s, 0x4e));
  s = add(s, _mm512_permute_ps(s, 0xb1));
  const __m512i every_fourth = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 12, 8, 4, 0);
  _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_permutexvar_ps(every_fourth, s)));
}

// A lane of a Sum takes 512 products in a block: 512 * 127 * 32639 < 2^31.
constexpr size_t kDotStep = 64, kDotBlock = 8192, kDotRows = 4, kDotStates = 2;
constexpr int64_t kDotOffset = 0;
using Sum = __m512i;
struct Weights {
  __m512i part[2];
};
using State = Weights;

inline Weights load_weights(const int8_t* w) {
  return {{_mm512_cvtepi8_epi16(_mm256_loadu_epi8(w)),
           _mm512_cvtepi8_epi16(_mm256_loadu_epi8(w + 32))}};
}
inline __mmask32 first_half(size_t n) {
  return n < 32 ? (1u << n) - 1 : ~0u;
}
inline __mmask32 second_half(size_t n) {
  return n > 32 ? (1u << (n - 32)) - 1 : 0u;
}
inline Weights load_weights(const int8_t* w, size_t n) {
  return {{_mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(first_half(n), w)),
           _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(second_half(n), w + 32))}};
}
inline State load_state(const WholeState& s, size_t i) {
  return {{_mm512_loadu_epi16(s.values + i), _mm512_loadu_epi16(s.values + i + 32)}};
}
inline State load_state(const WholeState& s, size_t i, size_t n) {
  return {{_mm512_maskz_loadu_epi16(first_half(n), s.values + i),
           _mm512_maskz_loadu_epi16(second_half(n), s.values + i + 32)}};
}
inline Sum no_sum() {
  return _mm512_setzero_si512();
}
inline Sum add_product(Sum sum, const Weights& w, const State& y) {
  sum = _mm512_add_epi32(sum, _mm512_madd_epi16(w.part[0], y.part[0]));
  return _mm512_add_epi32(sum, _mm512_madd_epi16(w.part[1], y.part[1]));
}
inline int64_t total(Sum sum) {
  const __m512i low = _mm512_cvtepi32_epi64(_mm512_castsi512_si256(sum));
  const __m512i high = _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(sum, 1));
  return _mm512_reduce_add_epi64(_mm512_add_epi64(low, high));
}

#include "cpu/simd/dot_i8_inl.h"

#include "cpu/simd/kernels_inl.h"

}  // namespace

extern const Kernels kAvx512Kernels;
const Kernels kAvx512Kernels = table("avx512");

}  // namespace infemeral::simd
