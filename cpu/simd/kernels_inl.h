// The loops of Kernels over a vector type, for one instruction set: included once by each
// instruction set's file, after it has defined, in the same anonymous namespace,
//
//   Vec, kLanes, kTileRows             the vector, its floats, rows of A in a register tile
//   kStreamBytes                       of W, from which on a row at a time is the fastest
//   zero() broadcast(x)
//   load(p) load(p, n)                 all lanes, or the first n < kLanes and zeros; for const
//                                      float*, F16*, BF16* and int8_t*
//   store(p, v) store(p, v, n)         for float* and F16*
//   store_bytes(p, v)                  whole numbers that int8_t holds
//   fma(a, b, c) = a*b+c, add, sub, mul, div, min(limit, x), max(limit, x)  (a NaN x stays NaN)
//   round_even(x), scale_by_pow2(x, n) x * 2^n for whole n in [-126, 127]
//   sum4(out, a, b, c, d)              the sums of four vectors' lanes, each in the same fixed tree
//   max_lane(v)
//
// and has included cpu/simd/dot_i8_inl.h,
// so that every function here has internal linkage and is compiled with that file's flags.
// No include guard: it is a body, not an interface.

// ---------------------------------------------------------------------------------------- matmul
//
// A tile is R rows of A against N rows of W: R*N vector accumulators, with both operands read along
// k, where they are contiguous, so nothing is packed. W is widened to f32 once a tile.

// Prefill walks k in blocks so that a tile's rows of A stay in L1; the accumulators of one panel of
// W rows wait in memory meanwhile, as whole vectors, which leaves the order of additions unchanged.
constexpr size_t kBlockK = 1024;
constexpr size_t kTileCols = 4;
constexpr size_t kPanelCols = 32;  // rows of W in a panel: 64 KiB of f16 per k block
constexpr size_t kVectorCols = 8;  // rows of W at once for a single row of A

// Where W comes from memory, the W of the next tile is fetched meanwhile: the hardware's own
// prefetchers would lose time finding its N streams. Short tiles look further than the next one, or
// the fetch would not be back in time.
constexpr size_t kAheadBytes = 4096;

// Which rows of the next tile's W are fetched; with two tiles of A on one of W, each fetches a
// half.
enum Ahead { kNone = 0, kAll = 3, kFront = 1, kBack = 2 };

template <size_t N, Ahead A>
constexpr bool fetches(size_t j) {
  return (A & (j < N / 2 ? kFront : kBack)) != 0;
}

// Elements of W in a cache line, or in a vector if that is more. A line is fetched once: a fetch
// for each of its vectors took up to a seventh of the bandwidth away.
template <typename W>
constexpr size_t kLineOf = 64 / sizeof(W) > kLanes ? 64 / sizeof(W) : kLanes;

template <size_t R, size_t N, Ahead A, typename W>
INFEMERAL_INLINE void multiply_tile(const float* a, size_t lda, const W* const (&w)[N], size_t ldw,
                                    size_t k, Vec (&acc)[R][N]) {
  constexpr size_t kStep = A == kNone ? kLanes : kLineOf<W>;
  const size_t enough = kAheadBytes / sizeof(W);
  const size_t ahead = N * ldw > enough ? N * ldw : enough;
  const auto add_vectors = [&](size_t i) INFEMERAL_INLINED {
    Vec av[R];
    for (size_t r = 0; r < R; ++r) av[r] = load(a + r * lda + i);
    for (size_t j = 0; j < N; ++j) {
      const Vec wv = load(w[j] + i);
      for (size_t r = 0; r < R; ++r) acc[r][j] = fma(av[r], wv, acc[r][j]);
    }
  };
  size_t i = 0;
  for (; i + kStep <= k; i += kStep) {
    for (size_t j = 0; j < N; ++j) {
      if (fetches<N, A>(j)) __builtin_prefetch(w[j] + i + ahead);
    }
    for (size_t v = 0; v < kStep; v += kLanes) add_vectors(i + v);
  }
  for (; i + kLanes <= k; i += kLanes) add_vectors(i);
  if (i < k) {
    Vec av[R];
    for (size_t r = 0; r < R; ++r) av[r] = load(a + r * lda + i, k - i);
    for (size_t j = 0; j < N; ++j) {
      const Vec wv = load(w[j] + i, k - i);
      for (size_t r = 0; r < R; ++r) acc[r][j] = fma(av[r], wv, acc[r][j]);
    }
  }
}

// The last tile of a row range repeats its last row of W, so that every tile has the same width.
template <size_t N, typename W>
INFEMERAL_INLINE void tile_rows(const Product& p, size_t j0, size_t k0, const W* (&rows)[N]) {
  for (size_t j = 0; j < N; ++j) {
    const size_t row = j0 + j < p.n ? j0 + j : p.n - 1;
    rows[j] = static_cast<const W*>(p.w) + row * p.ldw + k0;
  }
}

INFEMERAL_INLINE void store_sums(float* c, size_t n, const Vec (&acc)[kTileCols]) {
  if (n >= kTileCols) {
    sum4(c, acc[0], acc[1], acc[2], acc[3]);
  } else {
    float sums[kTileCols];
    sum4(sums, acc[0], acc[1], acc[2], acc[3]);
    for (size_t j = 0; j < n; ++j) c[j] = sums[j];
  }
}

// Much of W, from memory: row after row in one line, which is the order that the hardware's
// prefetchers like best, fetched far ahead into the second-level cache. One row is one chain of
// additions, so that this is for paths whose vectors are wide enough: kStreamBytes says from how
// many bytes of W on.
template <typename W>
void matmul_stream(const Product& p) {
  constexpr size_t kAhead = 8192 / sizeof(W), kStep = kLineOf<W>;
  for (size_t j = 0; j < p.n; j += kTileCols) {
    const W* rows[kTileCols];
    tile_rows(p, j, 0, rows);
    Vec acc[kTileCols];
    for (size_t c = 0; c < kTileCols; ++c) {
      acc[c] = zero();
      const auto add_vector = [&](size_t i) INFEMERAL_INLINED {
        acc[c] = fma(load(p.a + i), load(rows[c] + i), acc[c]);
      };
      size_t i = 0;
      for (; i + kStep <= p.k; i += kStep) {
        __builtin_prefetch(rows[c] + i + kAhead, 0, 2);
        for (size_t v = 0; v < kStep; v += kLanes) add_vector(i + v);
      }
      for (; i + kLanes <= p.k; i += kLanes) add_vector(i);
      if (i < p.k) acc[c] = fma(load(p.a + i, p.k - i), load(rows[c] + i, p.k - i), acc[c]);
    }
    store_sums(p.c + j, p.n - j, acc);
  }
}

// Decode: W streams from memory once. Eight rows at once hide the latency of the additions.
template <typename W>
void matmul_vector(const Product& p) {
  for (size_t j = 0; j < p.n; j += kVectorCols) {
    const W* rows[kVectorCols];
    tile_rows(p, j, 0, rows);
    Vec acc[1][kVectorCols];
    for (Vec& v : acc[0]) v = zero();
    multiply_tile<1, kVectorCols, kAll>(p.a, p.lda, rows, p.ldw, p.k, acc);
    for (size_t h = 0; h < kVectorCols && j + h < p.n; h += kTileCols) {
      const Vec part[kTileCols] = {acc[0][h], acc[0][h + 1], acc[0][h + 2], acc[0][h + 3]};
      store_sums(p.c + j + h, p.n - j - h, part);
    }
  }
}

// Rows that lie anywhere: those of the next tile are fetched piece by piece while this one is
// multiplied.
template <typename W>
void matmul_picked(const RowsProduct& p) {
  constexpr size_t kPiece = 512;
  for (size_t j = 0; j < p.n; j += kVectorCols) {
    const W* rows[kVectorCols];
    const W* next[kVectorCols];
    for (size_t c = 0; c < kVectorCols; ++c) {
      const size_t last = p.n - 1, row = j + c, after = row + kVectorCols;
      rows[c] = static_cast<const W*>(p.rows[row < last ? row : last]);
      next[c] = static_cast<const W*>(p.rows[after < last ? after : last]);
    }
    Vec acc[1][kVectorCols];
    for (Vec& v : acc[0]) v = zero();
    for (size_t i = 0; i < p.k; i += kPiece) {
      const size_t depth = p.k - i < kPiece ? p.k - i : kPiece;
      const W* piece[kVectorCols];
      for (size_t c = 0; c < kVectorCols; ++c) {
        piece[c] = rows[c] + i;
        for (size_t b = 0; b < depth; b += 64 / sizeof(W)) __builtin_prefetch(next[c] + i + b);
      }
      multiply_tile<1, kVectorCols, kNone>(p.a + i, 0, piece, 0, depth, acc);
    }
    for (size_t h = 0; h < kVectorCols && j + h < p.n; h += kTileCols) {
      const Vec part[kTileCols] = {acc[0][h], acc[0][h + 1], acc[0][h + 2], acc[0][h + 3]};
      store_sums(p.c + j + h, p.n - j - h, part);
    }
  }
}

// R rows of A, from row i0, against the panel of W rows [j0, j1); the first rows of A find the
// panel in memory, the others in the second-level cache.
template <size_t R, Ahead A, typename W>
void matmul_panel(const Product& p, size_t i0, size_t j0, size_t j1, size_t block_k) {
  Vec waiting[kPanelCols / kTileCols][R][kTileCols];
  size_t k0 = 0;
  do {
    const size_t depth = p.k - k0 < block_k ? p.k - k0 : block_k;
    const bool first = k0 == 0, last = k0 + depth == p.k;
    for (size_t j = j0; j < j1; j += kTileCols) {
      Vec(&slot)[R][kTileCols] = waiting[(j - j0) / kTileCols];
      Vec acc[R][kTileCols];
      for (size_t r = 0; r < R; ++r) {
        for (size_t c = 0; c < kTileCols; ++c) acc[r][c] = first ? zero() : slot[r][c];
      }
      const W* rows[kTileCols];
      tile_rows(p, j, k0, rows);
      const float* a = p.a + i0 * p.lda + k0;
      multiply_tile<R, kTileCols, A>(a, p.lda, rows, p.ldw, depth, acc);
      for (size_t r = 0; r < R; ++r) {
        if (last) {
          store_sums(p.c + (i0 + r) * p.ldc + j, j1 - j, acc[r]);
        } else {
          for (size_t c = 0; c < kTileCols; ++c) slot[r][c] = acc[r][c];
        }
      }
    }
    k0 += depth;
  } while (k0 < p.k);
}

// matmul_panel for a number of rows that is known at run time, at most R.
template <size_t R, Ahead A, typename W>
INFEMERAL_INLINE void matmul_rows(const Product& p, size_t rows, size_t i0, size_t j0, size_t j1,
                                  size_t block_k) {
  if constexpr (R > 0) {
    rows == R ? matmul_panel<R, A, W>(p, i0, j0, j1, block_k)
              : matmul_rows<R - 1, A, W>(p, rows, i0, j0, j1, block_k);
  }
}

// Few sessions that decode together, two tiles of rows: each tile of W serves both while it is in
// the first-level cache, and memory has the time of both to bring the next.
template <typename W>
void matmul_pair(const Product& p) {
  const size_t half = p.m / 2;
  for (size_t j = 0; j < p.n; j += kTileCols) {
    const size_t end = p.n - j < kTileCols ? p.n : j + kTileCols;
    matmul_rows<kTileRows, kFront, W>(p, half, 0, j, end, p.k);
    matmul_rows<kTileRows, kBack, W>(p, p.m - half, half, j, end, p.k);
  }
}

template <typename W>
void matmul(const Product& p) {
  if (p.m == 1 && p.n * p.k * sizeof(W) >= kStreamBytes) return matmul_stream<W>(p);
  if (p.m == 1) return matmul_vector<W>(p);
  // Tiles of nearly equal height: eight rows as 4 + 4, since 6 + 2 would widen W for two rows only.
  const size_t tiles = (p.m + kTileRows - 1) / kTileRows;
  if (tiles == 2) return matmul_pair<W>(p);
  // With one tile of rows W is read once and from memory: in whole rows, as it lies there.
  const size_t block_k = tiles == 1 ? p.k : kBlockK;
  for (size_t j0 = 0; j0 < p.n; j0 += kPanelCols) {
    const size_t j1 = p.n - j0 < kPanelCols ? p.n : j0 + kPanelCols;
    matmul_rows<kTileRows, kAll, W>(p, p.m / tiles, 0, j0, j1, block_k);
    for (size_t t = 1; t < tiles; ++t) {
      const size_t begin = p.m * t / tiles, end = p.m * (t + 1) / tiles;
      matmul_rows<kTileRows, kNone, W>(p, end - begin, begin, j0, j1, block_k);
    }
  }
}

// ------------------------------------------------------------------------------------ accumulate
//
// R rows of C times V vectors of columns in registers, along k.

template <size_t R, size_t V, bool First, typename W>
INFEMERAL_INLINE void accumulate_tile(const Product& p, size_t i0, size_t j0) {
  Vec acc[R][V];
  for (size_t r = 0; r < R; ++r) {
    for (size_t v = 0; v < V; ++v) acc[r][v] = load(p.c + (i0 + r) * p.ldc + j0 + v * kLanes);
  }
  const W* w = static_cast<const W*>(p.w) + j0;
  for (size_t i = 0; i < p.k; ++i, w += p.ldw) {
    Vec wv[V];
    for (size_t v = 0; v < V; ++v) {
      if constexpr (First) __builtin_prefetch(w + v * kLanes + kAheadBytes / sizeof(W));
      wv[v] = load(w + v * kLanes);
    }
    for (size_t r = 0; r < R; ++r) {
      const Vec x = broadcast(p.a[(i0 + r) * p.lda + i]);
      for (size_t v = 0; v < V; ++v) acc[r][v] = fma(x, wv[v], acc[r][v]);
    }
  }
  for (size_t r = 0; r < R; ++r) {
    for (size_t v = 0; v < V; ++v) store(p.c + (i0 + r) * p.ldc + j0 + v * kLanes, acc[r][v]);
  }
}

// The last n < kLanes columns of one row.
template <typename W>
void accumulate_edge(const Product& p, size_t i0, size_t j0) {
  float* c = p.c + i0 * p.ldc + j0;
  const size_t n = p.n - j0;
  Vec acc = load(c, n);
  for (size_t i = 0; i < p.k; ++i) {
    const Vec wv = load(static_cast<const W*>(p.w) + i * p.ldw + j0, n);
    acc = fma(broadcast(p.a[i0 * p.lda + i]), wv, acc);
  }
  store(c, acc, n);
}

template <size_t R, bool First, typename W>
void accumulate_rows(const Product& p, size_t i0) {
  constexpr size_t kVecs = 4;
  size_t j = 0;
  for (; j + kVecs * kLanes <= p.n; j += kVecs * kLanes) {
    accumulate_tile<R, kVecs, First, W>(p, i0, j);
  }
  for (; j + kLanes <= p.n; j += kLanes) accumulate_tile<R, 1, First, W>(p, i0, j);
  if (j < p.n) {
    for (size_t r = 0; r < R; ++r) accumulate_edge<W>(p, i0 + r, j);
  }
}

template <size_t R, typename W>
INFEMERAL_INLINE void accumulate_some_rows(const Product& p, size_t rows, size_t i0) {
  if constexpr (R > 0) {
    if (rows != R) return accumulate_some_rows<R - 1, W>(p, rows, i0);
    i0 == 0 ? accumulate_rows<R, true, W>(p, i0) : accumulate_rows<R, false, W>(p, i0);
  }
}

template <typename W>
void accumulate(const Product& p) {
  constexpr size_t kRows = kTileRows > 4 ? 4 : 2;
  for (size_t i = 0; i < p.m; i += kRows) {
    accumulate_some_rows<kRows, W>(p, p.m - i < kRows ? p.m - i : kRows, i);
  }
}

// ----------------------------------------------------------------------------------- elementwise

// exp(x) within 2 ulp on [-87.3, 88.3], where the result is a normal number; arguments outside are
// moved to the nearest end. Cephes' polynomial for expf (netlib.org/cephes).
INFEMERAL_INLINE Vec exp_approx(Vec x) {
  x = max(broadcast(-87.3f), min(broadcast(88.3f), x));
  const Vec n = round_even(mul(x, broadcast(1.44269504088896341f)));
  // ln 2 in two parts: n times the first is exact.
  Vec r = fma(n, broadcast(-0.693359375f), x);
  r = fma(n, broadcast(2.12194440e-4f), r);
  Vec y = broadcast(1.9875691500e-4f);
  y = fma(y, r, broadcast(1.3981999507e-3f));
  y = fma(y, r, broadcast(8.3334519073e-3f));
  y = fma(y, r, broadcast(4.1665795894e-2f));
  y = fma(y, r, broadcast(1.6666665459e-1f));
  y = fma(y, r, broadcast(5.0000001201e-1f));
  y = add(fma(mul(r, r), y, r), broadcast(1));
  return scale_by_pow2(y, n);
}

INFEMERAL_INLINE float sum_lanes(Vec v) {
  float sums[4];
  sum4(sums, v, v, v, v);
  return sums[0];
}

float softmax(float* x, size_t n, float scale) {
  Vec largest = broadcast(x[0]);
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) largest = max(largest, load(x + i));
  float top = max_lane(largest);
  for (size_t t = i; t < n; ++t) top = x[t] > top ? x[t] : top;

  const Vec shift = broadcast(top), factor = broadcast(scale);
  Vec total = zero();
  for (i = 0; i + kLanes <= n; i += kLanes) {
    const Vec e = exp_approx(mul(sub(load(x + i), shift), factor));
    store(x + i, e);
    total = add(total, e);
  }
  float sum = sum_lanes(total);
  if (i < n) {
    store(x + i, exp_approx(mul(sub(load(x + i, n - i), shift), factor)), n - i);
    sum += sum_lanes(load(x + i, n - i));
  }
  return sum;
}

INFEMERAL_INLINE Vec swiglu(Vec gate, Vec up) {
  const Vec e = exp_approx(sub(zero(), gate));
  return mul(div(gate, add(broadcast(1), e)), up);
}

void swiglu(float* gate, const float* up, size_t n) {
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(gate + i, swiglu(load(gate + i), load(up + i)));
  if (i < n) store(gate + i, swiglu(load(gate + i, n - i), load(up + i, n - i)), n - i);
}

void rms_norm(const float* x, const float* gain, float eps, size_t n, float* out) {
  Vec squares[2] = {zero(), zero()};
  size_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const Vec a = load(x + i), b = load(x + i + kLanes);
    squares[0] = fma(a, a, squares[0]);
    squares[1] = fma(b, b, squares[1]);
  }
  float sum = sum_lanes(add(squares[0], squares[1]));
  for (; i < n; ++i) sum += x[i] * x[i];
  const Vec inverse = broadcast(1.0f / __builtin_sqrtf(sum / static_cast<float>(n) + eps));
  for (i = 0; i + kLanes <= n; i += kLanes) {
    store(out + i, mul(mul(load(x + i), inverse), load(gain + i)));
  }
  if (i < n) store(out + i, mul(mul(load(x + i, n - i), inverse), load(gain + i, n - i)), n - i);
}

INFEMERAL_INLINE Vec clamp_f16(Vec x) {
  return max(broadcast(-65504.0f), min(broadcast(65504.0f), x));
}

void to_f16(const float* x, size_t n, uint16_t* out) {
  F16* halves = reinterpret_cast<F16*>(out);
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(halves + i, clamp_f16(load(x + i)));
  if (i < n) store(halves + i, clamp_f16(load(x + i, n - i)), n - i);
}

void from_f16(const uint16_t* x, size_t n, float* out) {
  const F16* halves = reinterpret_cast<const F16*>(x);
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load(halves + i));
  if (i < n) store(out + i, load(halves + i, n - i), n - i);
}

// --------------------------------------------------------------------- rounding to whole numbers

constexpr size_t kSquares = 512;  // a whole number of vectors

float row_range(const uint16_t* x, size_t n, double* squares) {
  const F16* halves = reinterpret_cast<const F16*>(x);
  Vec top = zero();
  double total = 0;
  for (size_t begin = 0; begin < n; begin += kSquares) {
    const size_t end = n - begin < kSquares ? n : begin + kSquares;
    Vec sum = zero();
    const auto add_square = [&](Vec v) {
      sum = fma(v, v, sum);
      top = max(top, max(sub(zero(), v), v));
    };
    size_t i = begin;
    for (; i + kLanes <= end; i += kLanes) add_square(load(halves + i));
    if (i < end) add_square(load(halves + i, end - i));
    total += static_cast<double>(sum_lanes(sum));
  }
  *squares = total;
  return max_lane(top);
}

double round_row(const uint16_t* x, size_t n, float scale, int8_t* q) {
  const F16* halves = reinterpret_cast<const F16*>(x);
  const Vec step = broadcast(scale), most = broadcast(127), least = broadcast(-127);
  double total = 0;
  for (size_t begin = 0; begin < n; begin += kSquares) {
    const size_t end = n - begin < kSquares ? n : begin + kSquares;
    Vec sum = zero();
    const auto round = [&](Vec v) {
      const Vec whole = max(least, min(most, round_even(div(v, step))));
      const Vec error = fma(sub(zero(), whole), step, v);
      sum = fma(error, error, sum);
      return whole;
    };
    size_t i = begin;
    for (; i + kLanes <= end; i += kLanes) store_bytes(q + i, round(load(halves + i)));
    if (i < end) {
      int8_t last[kLanes];
      store_bytes(last, round(load(halves + i, end - i)));
      __builtin_memcpy(q + i, last, end - i);
    }
    total += static_cast<double>(sum_lanes(sum));
  }
  return total;
}

double exact_dot(const float* x, const uint16_t* w, size_t n) {
  const F16* halves = reinterpret_cast<const F16*>(w);
  Vec sum = zero(), lost = zero();
  // Knuth's TwoSum: what rounding takes from each sum is itself a float.
  const auto add_products = [&](Vec a, Vec b) INFEMERAL_INLINED {
    const Vec product = mul(a, b), next = add(sum, product), added = sub(next, sum);
    lost = add(lost, add(sub(sum, sub(next, added)), sub(product, added)));
    sum = next;
  };
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) add_products(load(x + i), load(halves + i));
  if (i < n) add_products(load(x + i, n - i), load(halves + i, n - i));
  float sums[kLanes], rests[kLanes];
  store(sums, sum);
  store(rests, lost);
  double total = 0;
  for (size_t l = 0; l < kLanes; ++l) {
    total += static_cast<double>(sums[l]) + static_cast<double>(rests[l]);
  }
  return total;
}

constexpr Kernels table(const char* name) {
  return {.name = name,
          .matmul = {matmul<float>, matmul<F16>, matmul<BF16>, matmul<int8_t>},
          .sum_error = kLanes >= 8 ? 0x1p-24f : 0x1p-23f,
          .matmul_picked = {matmul_picked<float>, matmul_picked<F16>, matmul_picked<BF16>,
                            matmul_picked<int8_t>},
          .exact_dot = exact_dot,
          .accumulate = {accumulate<float>, accumulate<F16>},
          .dot_i8 = dot_i8,
          .row_range = row_range,
          .round_row = round_row,
          .softmax = softmax,
          .swiglu = swiglu,
          .rms_norm = rms_norm,
          .to_f16 = to_f16,
          .from_f16 = from_f16};
}
