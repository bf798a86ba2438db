// Any machine: 4 lanes in the compiler's own vector type, no fused multiply-add.
#include "cpu/simd/kernels.h"
#include "engine/float16.h"

namespace infemeral::simd {
namespace {

using Vec = float __attribute__((vector_size(16)));
using Bits = int32_t __attribute__((vector_size(16)));
using Halves = uint16_t __attribute__((vector_size(8)));
constexpr size_t kLanes = 4;
constexpr size_t kTileRows = 2;
constexpr size_t kStreamBytes = ~size_t{0};  // never: one row is too long a chain

struct F16 {
  uint16_t bits;
};
struct BF16 {
  uint16_t bits;
};

inline Vec zero() {
  return Vec{};
}
inline Vec broadcast(float x) {
  return Vec{x, x, x, x};
}

inline Bits load_halves(const void* p, size_t n = kLanes) {
  Halves h{};
  __builtin_memcpy(&h, p, n * sizeof(uint16_t));
  return __builtin_convertvector(h, Bits);
}

inline Vec load(const float* p, size_t n = kLanes) {
  Vec v{};
  __builtin_memcpy(&v, p, n * sizeof(float));
  return v;
}
// Shifted into place the exponent is 112 too small; a multiplication repairs it and is exact for
// subnormals too. Infinities and NaN get their full exponent back.
inline Vec widen_f16(Bits h) {
  const Bits magnitude = h & 0x7fff;
  const Vec finite = reinterpret_cast<Vec>(magnitude << 13) * broadcast(0x1p112f);
  const Bits special = (magnitude >= 0x7c00) & 0x7f800000;
  return reinterpret_cast<Vec>(reinterpret_cast<Bits>(finite) | special | ((h & 0x8000) << 16));
}
inline Vec load(const F16* p, size_t n = kLanes) {
  return widen_f16(load_halves(p, n));
}
inline Vec load(const BF16* p, size_t n = kLanes) {
  return reinterpret_cast<Vec>(load_halves(p, n) << 16);
}

inline Vec load(const int8_t* p, size_t n = kLanes) {
  int8_t bytes __attribute__((vector_size(4))) = {};
  __builtin_memcpy(&bytes, p, n);
  return __builtin_convertvector(bytes, Vec);
}

inline void store(float* p, Vec v, size_t n = kLanes) {
  __builtin_memcpy(p, &v, n * sizeof(float));
}
inline void store(F16* p, Vec v, size_t n = kLanes) {
  for (size_t i = 0; i < n; ++i) p[i].bits = f32_to_f16(v[i]);
}

inline void store_bytes(int8_t* p, Vec v) {
  for (size_t i = 0; i < kLanes; ++i) p[i] = static_cast<int8_t>(v[i]);
}

inline Vec fma(Vec a, Vec b, Vec c) {
  return a * b + c;
}
inline Vec add(Vec a, Vec b) {
  return a + b;
}
inline Vec sub(Vec a, Vec b) {
  return a - b;
}
inline Vec mul(Vec a, Vec b) {
  return a * b;
}
inline Vec div(Vec a, Vec b) {
  return a / b;
}
inline Vec select(Bits mask, Vec a, Vec b) {
  return reinterpret_cast<Vec>((reinterpret_cast<Bits>(a) & mask) |
                               (reinterpret_cast<Bits>(b) & ~mask));
}
inline Vec min(Vec limit, Vec x) {
  return select(x > limit, limit, x);
}
inline Vec max(Vec limit, Vec x) {
  return select(x < limit, limit, x);
}
inline float max_lane(Vec v) {
  float top = v[0];
  for (size_t i = 1; i < kLanes; ++i) top = v[i] > top ? v[i] : top;
  return top;
}

// Adding 1.5 * 2^23 leaves no room for a fraction; exact for |x| < 2^22.
inline Vec round_even(Vec x) {
  const Vec magic = broadcast(12582912.0f);
  return (x + magic) - magic;
}
inline Vec scale_by_pow2(Vec x, Vec n) {
  Bits exponent;
  for (size_t i = 0; i < kLanes; ++i) {
    // A NaN has no exponent, and stays NaN in x.
    exponent[i] = n[i] == n[i] ? static_cast<int32_t>(n[i]) + 127 : 127;
  }
  return x * reinterpret_cast<Vec>(exponent << 23);
}

inline float sum_tree(Vec v) {
  return (v[0] + v[2]) + (v[1] + v[3]);
}
inline void sum4(float* out, Vec a, Vec b, Vec c, Vec d) {
  store(out, Vec{sum_tree(a), sum_tree(b), sum_tree(c), sum_tree(d)});
}

// Loops that the compiler makes vectors of. 512 * 127 * 32639 < 2^31.
constexpr size_t kDotStep = 512, kDotBlock = 512, kDotRows = 1, kDotStates = 1;
constexpr int64_t kDotOffset = 0;
using Sum = int32_t;
struct Weights {
  const int8_t* values;
  size_t n;
};
using State = const int16_t*;

inline Weights load_weights(const int8_t* w, size_t n = kDotStep) {
  return {w, n};
}
inline State load_state(const WholeState& s, size_t i, size_t /*n*/ = kDotStep) {
  return s.values + i;
}
inline Sum no_sum() {
  return 0;
}
inline Sum add_product(Sum sum, const Weights& w, State y) {
  for (size_t i = 0; i < w.n; ++i) sum += w.values[i] * y[i];
  return sum;
}
inline int64_t total(Sum sum) {
  return sum;
}

#include "cpu/simd/dot_i8_inl.h"

#include "cpu/simd/kernels_inl.h"

}  // namespace

extern const Kernels kPortableKernels;
const Kernels kPortableKernels = table("portable");

}  // namespace infemeral::simd
