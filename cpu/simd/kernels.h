// The hot loops of the CPU backend, once per instruction set. A Kernels is a table of plain
// functions over pointers and sizes; cpu/simd/dispatch.h chooses one at run time.
//
// Files that are compiled with their own instruction-set flags include this header and no other of
// the project or of the C++ library: an inline function that they shared with the rest of the
// program could be merged by the linker into a copy that the machine cannot run.
//
// None of the pointers needs more alignment than its element type.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace infemeral::simd {

// How the second operand of a product is stored.
enum class Format { kF32 = 0, kF16 = 1, kBF16 = 2, kI8 = 3 };
inline constexpr size_t kFormats = 4;

// The operands of a product; strides are in elements.
struct Product {
  const float* a;  // m rows of k, lda apart
  size_t lda;
  const void* w;  // matmul: n rows of k, ldw apart; accumulate: k rows of n
  size_t ldw;
  float* c;  // m rows of n, ldc apart
  size_t ldc;
  size_t m;
  size_t n;
  size_t k;
};

// Single rows of a weight matrix, wherever they lie: c[j] = rows[j] . a.
struct RowsProduct {
  const float* a;           // k
  const void* const* rows;  // n pointers to k elements
  float* c;                 // n
  size_t n;
  size_t k;
};

// A state in whole numbers, in both of the ways that instruction sets multiply it.
struct WholeState {
  const int16_t* values;  // k, in [-32639, 32639]; values = 256 * high + low
  const int8_t* high;     // k
  const int8_t* low;      // k
  int64_t sum;            // of the values
};

// Whole numbers: out[s * ldo + r] = sum of w[r * ldw + i] * states[s].values[i] over i < k,
// exactly.
struct Int8Product {
  const int8_t* w;  // n rows of k, ldw apart; at least -127
  size_t ldw;
  const WholeState* states;  // m
  int64_t* out;              // m rows of n, ldo apart
  size_t ldo;
  size_t m;
  size_t n;
  size_t k;
};

struct Kernels {
  // "portable", "avx2", "avx512"; "avxvnni" and "avx512vnni": the same with another dot_i8.
  const char* name;

  // C = A * W^T, W in the format of the index. An element's bits depend on its row of A, its row of
  // W and k alone: lane l of one vector accumulator takes the products of the elements
  // l, l + lanes, l + 2 lanes, ... in this order, and the lanes are summed in a fixed tree. So a
  // prefill of many rows gives the bits of as many decode steps, wherever tiles and threads cut.
  void (*matmul[kFormats])(const Product& product);

  // How far an element of matmul's product is from the exact sum, of |a| |w|, where both hold
  // binary16 numbers: farther than this once in a million sums.
  float sum_error;

  // The same bits as matmul gives for these rows.
  void (*matmul_picked[kFormats])(const RowsProduct& product);

  // The sum of x[i] * w[i], exact but for 2^-44 of the products' magnitudes; x holds binary16
  // numbers, so that no product is rounded.
  double (*exact_dot)(const float* x, const uint16_t* w, size_t n);

  // C += A * W: element by element, products are added in the order of k. A zero in A adds nothing
  // to a finite sum, so rows that use different parts of W can share a call. For f32 and f16 only.
  void (*accumulate[2])(const Product& product);

  // For the certified head.
  void (*dot_i8)(const Int8Product& product);

  // Rounding rows of binary16 to whole numbers. row_range returns the largest |x| and the sum of
  // x^2; round_row writes q = x / scale, rounded to nearest even, at most 127 of either sign, and
  // returns the sum of (x - scale * q)^2. Squares are summed in float32, 512 at a time: both sums
  // are within 2^-16 of their terms' sum. A row with a value that is not finite has no finite sum.
  float (*row_range)(const uint16_t* x, size_t n, double* squares);
  double (*round_row)(const uint16_t* x, size_t n, float scale, int8_t* q);

  // x[i] <- exp((x[i] - max) * scale), scale > 0; returns their sum. The sum's order depends on n
  // alone.
  float (*softmax)(float* x, size_t n, float scale);

  // gate[i] <- gate[i] * sigmoid(gate[i]) * up[i]
  void (*swiglu)(float* gate, const float* up, size_t n);

  // out[i] = gain[i] * x[i] / sqrt(mean of x^2 + eps); out may be x.
  void (*rms_norm)(const float* x, const float* gain, float eps, size_t n, float* out);

  // binary16, round to nearest even; values beyond +-65504 are clamped to it.
  void (*to_f16)(const float* x, size_t n, uint16_t* out);
  void (*from_f16)(const uint16_t* x, size_t n, float* out);
};

}  // namespace infemeral::simd
