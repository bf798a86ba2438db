// AVX-VNNI, for machines without AVX-512: cpu/simd/avx512_vnni.cpp in half as wide vectors.
#include <immintrin.h>

#include "cpu/simd/kernels.h"

namespace infemeral::simd {
namespace {

// A lane of a Sum takes at most 8192 products of 255 * 128 in a block.
constexpr size_t kDotStep = 32, kDotBlock = 65536, kDotRows = 4, kDotStates = 1;
constexpr int64_t kDotOffset = -128;
using Weights = __m256i;
struct Sum {
  __m256i high, low;
};
using State = Sum;

inline __m256i load_bytes(const int8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline __m256i load_bytes(const int8_t* p, size_t n) {
  int8_t buffer[kDotStep] = {};
  __builtin_memcpy(buffer, p, n);
  return load_bytes(buffer);
}
inline Weights to_unsigned(__m256i w) {
  return _mm256_xor_si256(w, _mm256_set1_epi8(-128));
}
inline Weights load_weights(const int8_t* w) {
  return to_unsigned(load_bytes(w));
}
inline Weights load_weights(const int8_t* w, size_t n) {
  return to_unsigned(load_bytes(w, n));
}
inline State load_state(const WholeState& s, size_t i) {
  return {load_bytes(s.high + i), load_bytes(s.low + i)};
}
inline State load_state(const WholeState& s, size_t i, size_t n) {
  return {load_bytes(s.high + i, n), load_bytes(s.low + i, n)};
}
inline Sum no_sum() {
  return {_mm256_setzero_si256(), _mm256_setzero_si256()};
}
inline Sum add_product(const Sum& sum, Weights w, const State& y) {
  return {_mm256_dpbusd_avx_epi32(sum.high, w, y.high), _mm256_dpbusd_avx_epi32(sum.low, w, y.low)};
}
inline int64_t add_lanes(__m256i sum) {
  const __m256i s = _mm256_add_epi64(_mm256_cvtepi32_epi64(_mm256_castsi256_si128(sum)),
                                     _mm256_cvtepi32_epi64(_mm256_extracti128_si256(sum, 1)));
  const __m128i t = _mm_add_epi64(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
  return _mm_extract_epi64(t, 0) + _mm_extract_epi64(t, 1);
}
inline int64_t total(const Sum& sum) {
  return 256 * add_lanes(sum.high) + add_lanes(sum.low);
}

#include "cpu/simd/dot_i8_inl.h"

}  // namespace

extern void (*const kAvxVnniDotI8)(const Int8Product&);
void (*const kAvxVnniDotI8)(const Int8Product&) = dot_i8;

}  // namespace infemeral::simd
