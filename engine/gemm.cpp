#include "engine/gemm.h"

#include <sodium.h>
#include <sys/mman.h>

#include <oneapi/tbb/blocked_range.h>
#include <oneapi/tbb/blocked_range2d.h>
#include <oneapi/tbb/parallel_for.h>

#include <algorithm>
#include <new>

#include "engine/gemm_kernel.h"

namespace infemeral {
namespace {

// A block of A (kBlockM x kBlockK) and one of B (kBlockK x kBlockN) are packed by all threads, and
// their product is cut into panels. In a panel kBlockK x kPanelN of B (288 KiB in float32) stays in
// the L2 of its core and a sliver of A (tile rows x kBlockK) in the L1, so that every element of B
// that a tile loads comes from the L2, which is fast enough for it, and C is passed over in order.
constexpr std::size_t kBlockM = 4096, kBlockN = 4096;
constexpr std::size_t kBlockK = 256;                 // the order of summation: see gemm.h
constexpr std::size_t kPanelM = 224, kPanelN = 288;  // multiples of every tile's rows and columns
constexpr std::size_t kMaxTileBytes = 14 * 2 * 64;   // rows, vectors, bytes of a vector
constexpr std::size_t kHugePage = std::size_t{2} << 20;

GemmKernels choose_kernels() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return gemm_kernels_avx512();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return gemm_kernels_avx2();
#endif
  return gemm_kernels_baseline();
}

const GemmKernels& kernels() {
  static const GemmKernels chosen = choose_kernels();
  return chosen;
}

// Wiped when freed: what is multiplied may be the cloak. On huge pages when it fills some: packing
// writes to as many pages at a time as there are slivers.
template <typename T>
class AlignedBuffer {
 public:
  explicit AlignedBuffer(std::size_t n)
      : bytes_(n * sizeof(T)),
        alignment_{bytes_ < kHugePage ? kCacheLine : kHugePage},
        data_(static_cast<T*>(::operator new(bytes_, alignment_))) {
    if (bytes_ >= kHugePage) madvise(data_, bytes_, MADV_HUGEPAGE);
  }
  ~AlignedBuffer() {
    sodium_memzero(data_, bytes_);
    ::operator delete(data_, alignment_);
  }
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;
  T* data() const { return data_; }

 private:
  static constexpr std::size_t kCacheLine = 64;
  const std::size_t bytes_;
  const std::align_val_t alignment_;
  T* data_;
};

std::size_t divide_up(std::size_t n, std::size_t step) {
  return (n + step - 1) / step;
}
std::size_t round_up(std::size_t n, std::size_t step) {
  return divide_up(n, step) * step;
}

// Packs `lines` x k elements into slivers of `width` lines: p-major inside a sliver, missing lines
// as zeros. For A a line is a row; for B, seen transposed, a column. What is contiguous in memory
// is read in one go: the beginnings of rows are pages apart, often in one set of the L1.
template <typename T>
void pack(std::size_t lines, std::size_t k, std::size_t width, T scale, BasicConstMatrix<T> m,
          T* out) {
  const std::size_t whole = lines / width * width;
  std::fill(out + whole * k, out + round_up(lines, width) * k, T{0});
  if (m.row_stride == 1) {
    for (std::size_t p = 0; p < k; ++p) {
      const T* source = m.block(0, p).data;
      for (std::size_t first = 0; first < lines; first += width) {
        T* target = out + first * k + p * width;
        const std::size_t count = std::min(width, lines - first);
        for (std::size_t i = 0; i < count; ++i) target[i] = scale * source[first + i];
      }
    }
    return;
  }
  for (std::size_t line = 0; line < lines; ++line) {
    const T* source = m.block(line, 0).data;
    T* target = out + line / width * width * k + line % width;
    for (std::size_t p = 0; p < k; ++p) {
      target[p * width] = scale * source[static_cast<std::ptrdiff_t>(p) * m.col_stride];
    }
  }
}

// The same, by all threads.
template <typename T>
void pack_block(std::size_t lines, std::size_t k, std::size_t width, T scale, BasicConstMatrix<T> m,
                T* out) {
  constexpr std::size_t kGrain = 8;  // slivers
  const tbb::blocked_range<std::size_t> slivers(0, divide_up(lines, width), kGrain);
  tbb::parallel_for(slivers, [&](const auto& range) {
    const std::size_t first = range.begin() * width;
    const std::size_t count = std::min(range.end() * width, lines) - first;
    pack(count, k, width, scale, m.block(first, 0), out + first * k);
  });
}

// C += A B for a panel, from slivers of A and B.
template <typename T>
void add_panel(const GemmKernel<T>& tile, std::size_t m, std::size_t n, std::size_t k, const T* a,
               const T* b, T* c, std::size_t c_stride) {
  for (std::size_t i = 0; i < m; i += tile.rows) {
    for (std::size_t j = 0; j < n; j += tile.cols) {
      const std::size_t rows = std::min(tile.rows, m - i), cols = std::min(tile.cols, n - j);
      T* out = c + i * c_stride + j;
      if (rows == tile.rows && cols == tile.cols) {
        tile.run(k, a + i * k, b + j * k, out, c_stride);
        continue;
      }
      alignas(64) T whole[kMaxTileBytes / sizeof(T)] = {};
      tile.run(k, a + i * k, b + j * k, whole, tile.cols);
      for (std::size_t r = 0; r < rows; ++r) {
        for (std::size_t x = 0; x < cols; ++x) out[r * c_stride + x] += whole[r * tile.cols + x];
      }
    }
  }
}

template <typename T>
void add_product(const GemmKernel<T>& tile, std::size_t m, std::size_t n, std::size_t k, T alpha,
                 BasicConstMatrix<T> a, BasicConstMatrix<T> b, T* c, std::size_t c_stride) {
  const std::size_t depth = std::min(kBlockK, k);
  const AlignedBuffer<T> packed_a(round_up(std::min(kBlockM, m), tile.rows) * depth);
  const AlignedBuffer<T> packed_b(round_up(std::min(kBlockN, n), tile.cols) * depth);
  for (std::size_t j0 = 0; j0 < n; j0 += kBlockN) {
    const std::size_t nb = std::min(kBlockN, n - j0);
    for (std::size_t p0 = 0; p0 < k; p0 += kBlockK) {
      const std::size_t kb = std::min(kBlockK, k - p0);
      pack_block<T>(nb, kb, tile.cols, T{1}, b.block(p0, j0).transposed(), packed_b.data());
      for (std::size_t i0 = 0; i0 < m; i0 += kBlockM) {
        const std::size_t mb = std::min(kBlockM, m - i0);
        pack_block<T>(mb, kb, tile.rows, alpha, a.block(i0, p0), packed_a.data());
        const tbb::blocked_range2d<std::size_t> panels(0, divide_up(mb, kPanelM), 1,  //
                                                       0, divide_up(nb, kPanelN), 1);
        tbb::parallel_for(panels, [&](const auto& range) {
          const std::size_t i_end = std::min(range.rows().end() * kPanelM, mb);
          const std::size_t j_end = std::min(range.cols().end() * kPanelN, nb);
          for (std::size_t j = range.cols().begin() * kPanelN; j < j_end; j += kPanelN) {
            const std::size_t i = range.rows().begin() * kPanelM;
            add_panel(tile, i_end - i, std::min(kPanelN, j_end - j), kb, packed_a.data() + i * kb,
                      packed_b.data() + j * kb, c + (i0 + i) * c_stride + j0 + j, c_stride);
          }
        });
      }
    }
  }
}

}  // namespace

void gemm_add(std::size_t m, std::size_t n, std::size_t k, double alpha, ConstMatrix a,
              ConstMatrix b, double* c, std::size_t c_stride) {
  add_product(kernels().f64, m, n, k, alpha, a, b, c, c_stride);
}

void gemm_add(std::size_t m, std::size_t n, std::size_t k, float alpha, ConstMatrixF32 a,
              ConstMatrixF32 b, float* c, std::size_t c_stride) {
  add_product(kernels().f32, m, n, k, alpha, a, b, c, c_stride);
}

std::string_view gemm_kernel_name() {
  return kernels().name;
}

}  // namespace infemeral
