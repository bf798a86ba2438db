// AVX-512 VNNI: products of bytes, four at a time. The instruction multiplies unsigned by signed
// bytes: weights become unsigned by adding 128, which the sum of the state takes back.
#include <immintrin.h>

#include "cpu/simd/kernels.h"

namespace infemeral::simd {
namespace {

// A lane of a Sum takes at most 4096 products of 255 * 128 in a block.
constexpr size_t kDotStep = 64, kDotBlock = 65536, kDotRows = 4, kDotStates = 2;
constexpr int64_t kDotOffset = -128;
using Weights = __m512i;
struct Sum {
  __m512i high, low;
};
using State = Sum;

inline __mmask64 first(size_t n) {
  return (uint64_t{1} << n) - 1;
}
inline Weights to_unsigned(__m512i w) {
  return _mm512_xor_si512(w, _mm512_set1_epi8(-128));
}
inline Weights load_weights(const int8_t* w) {
  return to_unsigned(_mm512_loadu_epi8(w));
}
inline Weights load_weights(const int8_t* w, size_t n) {
  return to_unsigned(_mm512_maskz_loadu_epi8(first(n), w));
}
inline State load_state(const WholeState& s, size_t i) {
  return {_mm512_loadu_epi8(s.high + i), _mm512_loadu_epi8(s.low + i)};
}
inline State load_state(const WholeState& s, size_t i, size_t n) {
  return {_mm512_maskz_loadu_epi8(first(n), s.high + i),
          _mm512_maskz_loadu_epi8(first(n), s.low + i)};
}
inline Sum no_sum() {
  return {_mm512_setzero_si512(), _mm512_setzero_si512()};
}
inline Sum add_product(const Sum& sum, Weights w, const State& y) {
  return {_mm512_dpbusd_epi32(sum.high, w, y.high), _mm512_dpbusd_epi32(sum.low, w, y.low)};
}
inline int64_t total(const Sum& sum) {
  return int64_t{256} * _mm512_reduce_add_epi32(sum.high) + _mm512_reduce_add_epi32(sum.low);
}

#include "cpu/simd/dot_i8_inl.h"

}  // namespace

extern void (*const kAvx512VnniDotI8)(const Int8Product&);
void (*const kAvx512VnniDotI8)(const Int8Product&) = dot_i8;

}  // namespace infemeral::simd
