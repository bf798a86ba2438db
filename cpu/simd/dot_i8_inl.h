// The certified head's product of whole numbers for one instruction set: included like
// cpu/simd/kernels_inl.h, by files that have defined, in the same anonymous namespace,
//
//   kDotStep               elements of one step
//   kDotBlock              elements, a whole number of steps, after which a Sum might overflow
//   kDotRows, kDotStates   rows of W and states at once; one or two states
//   kDotOffset             see below
//   Weights load_weights(w)  and load_weights(w, n): n < kDotStep elements, and zeros
//   State load_state(s, i)   and load_state(s, i, n): elements i.. of a WholeState
//   Sum no_sum() add_product(sum, weights, state) total(sum) -> int64_t
//
// where total() of all blocks, plus kDotOffset * (the sum of the state), is the product.
// No include guard: it is a body, not an interface.

#define INFEMERAL_INLINED __attribute__((always_inline))  // of a lambda
#define INFEMERAL_INLINE inline INFEMERAL_INLINED

// N rows of W from memory against S states. With Ahead the next rows are fetched meanwhile.
template <size_t N, size_t S, bool Ahead>
INFEMERAL_INLINE void dot_tile(const Int8Product& p, const int8_t* const (&w)[N], size_t s0,
                               int64_t* out, size_t rows) {
  int64_t totals[S][N];
  for (size_t s = 0; s < S; ++s) {
    for (size_t r = 0; r < N; ++r) totals[s][r] = kDotOffset * p.states[s0 + s].sum;
  }
  for (size_t begin = 0; begin < p.k; begin += kDotBlock) {
    const size_t end = p.k - begin < kDotBlock ? p.k : begin + kDotBlock;
    Sum sums[S][N];
    for (size_t s = 0; s < S; ++s) {
      for (size_t r = 0; r < N; ++r) sums[s][r] = no_sum();
    }
    size_t i = begin;
    for (; i + kDotStep <= end; i += kDotStep) {
      State state[S];
      for (size_t s = 0; s < S; ++s) state[s] = load_state(p.states[s0 + s], i);
      for (size_t r = 0; r < N; ++r) {
        if constexpr (Ahead) __builtin_prefetch(w[r] + i + N * p.ldw);
        const Weights weights = load_weights(w[r] + i);
        for (size_t s = 0; s < S; ++s) sums[s][r] = add_product(sums[s][r], weights, state[s]);
      }
    }
    if (i < end) {
      State state[S];
      for (size_t s = 0; s < S; ++s) state[s] = load_state(p.states[s0 + s], i, end - i);
      for (size_t r = 0; r < N; ++r) {
        const Weights weights = load_weights(w[r] + i, end - i);
        for (size_t s = 0; s < S; ++s) sums[s][r] = add_product(sums[s][r], weights, state[s]);
      }
    }
    for (size_t s = 0; s < S; ++s) {
      for (size_t r = 0; r < N; ++r) totals[s][r] += total(sums[s][r]);
    }
  }
  for (size_t s = 0; s < S; ++s) {
    for (size_t r = 0; r < rows; ++r) out[(s0 + s) * p.ldo + r] = totals[s][r];
  }
}

// One state: W streams from memory, row after row in one line, which is the order that the hardware
// likes best; fetched this far ahead, every cache line once, into the second-level cache, it is
// there after a pause of the caller's too.
void dot_stream(const Int8Product& p) {
  constexpr size_t kAhead = 16384, kLine = kDotStep < 64 ? 64 : kDotStep;
  const WholeState& y = p.states[0];
  for (size_t r = 0; r < p.n; ++r) {
    const int8_t* w = p.w + r * p.ldw;
    int64_t product = kDotOffset * y.sum;
    for (size_t begin = 0; begin < p.k; begin += kDotBlock) {
      const size_t end = p.k - begin < kDotBlock ? p.k : begin + kDotBlock;
      Sum sum = no_sum();
      const auto add_step = [&](size_t i) INFEMERAL_INLINED {
        sum = add_product(sum, load_weights(w + i), load_state(y, i));
      };
      size_t i = begin;
      for (; i + kLine <= end; i += kLine) {
        __builtin_prefetch(w + i + kAhead, 0, 2);
        for (size_t step = 0; step < kLine; step += kDotStep) add_step(i + step);
      }
      for (; i + kDotStep <= end; i += kDotStep) add_step(i);
      if (i < end) {
        sum = add_product(sum, load_weights(w + i, end - i), load_state(y, i, end - i));
      }
      product += total(sum);
    }
    p.out[r] = product;
  }
}

void dot_i8(const Int8Product& p) {
  if (p.m == 1) return dot_stream(p);
  for (size_t r = 0; r < p.n; r += kDotRows) {
    // The last tile repeats its last row of W, so that every tile has the same width.
    const size_t rows = p.n - r < kDotRows ? p.n - r : kDotRows;
    const int8_t* w[kDotRows];
    for (size_t j = 0; j < kDotRows; ++j) w[j] = p.w + (r + (j < rows ? j : rows - 1)) * p.ldw;
    size_t s = 0;
    if (p.m % kDotStates == 0) {
      dot_tile<kDotRows, kDotStates, true>(p, w, s, p.out + r, rows);
      s += kDotStates;
    } else {
      dot_tile<kDotRows, 1, true>(p, w, s++, p.out + r, rows);
    }
    for (; s < p.m; s += kDotStates) {
      dot_tile<kDotRows, kDotStates, false>(p, w, s, p.out + r, rows);
    }
  }
}
