#include "engine/gemm.h"

#include <sodium.h>

#include <oneapi/tbb/blocked_range.h>
#include <oneapi/tbb/blocked_range2d.h>
#include <oneapi/tbb/parallel_for.h>

#include <algorithm>
#include <new>

#include "engine/gemm_kernel.h"

namespace infemeral {
namespace {

// Block sizes: a packed panel of A (kBlockM x kBlockK, 256 KiB in float64) and the panel of B that
// it is multiplied with (kBlockK x kPanelN) stay in the L2 of their core, a sliver of B (kBlockK x
// tile columns) in the L1.
constexpr std::size_t kBlockM = 128;
constexpr std::size_t kBlockK = 256;
constexpr std::size_t kPanelN = 480;  // a multiple of every tile's columns
constexpr std::size_t kBlockN = 4096;
constexpr std::size_t kMaxTileBytes = 8 * 3 * 64;  // rows, vectors, bytes of a vector

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

// Wiped when freed: what is multiplied may be the cloak.
template <typename T>
class AlignedBuffer {
 public:
  explicit AlignedBuffer(std::size_t n)
      : bytes_(n * sizeof(T)),
        data_(static_cast<T*>(::operator new (bytes_, std::align_val_t{kAlignment}))) {}
  ~AlignedBuffer() {
    sodium_memzero(data_, bytes_);
    ::operator delete (data_, std::align_val_t{kAlignment});
  }
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;
  T* data() const { return data_; }

 private:
  static constexpr std::size_t kAlignment = 64;
  const std::size_t bytes_;
  T* data_;
};

std::size_t round_up(std::size_t n, std::size_t step) {
  return (n + step - 1) / step * step;
}

// Packs `lines` x k elements into slivers of `width` lines: p-major inside a sliver, missing lines
// as zeros. For A a line is a row; for B, seen transposed, a column.
template <typename T>
void pack(std::size_t lines, std::size_t k, std::size_t width, T scale, BasicConstMatrix<T> m,
          T* out) {
  for (std::size_t first = 0; first < lines; first += width) {
    const std::size_t count = std::min(width, lines - first);
    const BasicConstMatrix<T> sliver = m.block(first, 0);
    for (std::size_t p = 0; p < k; ++p) {
      const T* source = sliver.data + static_cast<std::ptrdiff_t>(p) * sliver.col_stride;
      for (std::size_t i = 0; i < count; ++i) {
        out[i] = scale * source[static_cast<std::ptrdiff_t>(i) * sliver.row_stride];
      }
      std::fill(out + count, out + width, T{0});
      out += width;
    }
  }
}

template <typename T>
void add_product(const GemmKernel<T>& tile, std::size_t m, std::size_t n, std::size_t k, T alpha,
                 BasicConstMatrix<T> a, BasicConstMatrix<T> b, T* c, std::size_t c_stride) {
  const std::size_t block_n = std::min(kBlockN, n);
  const AlignedBuffer<T> packed_b(round_up(block_n, tile.cols) * kBlockK);
  // mb rows of C from i0 on, and its columns from j0 + first to j0 + last, have kb terms added.
  const auto add_block = [&](std::size_t i0, std::size_t mb, std::size_t j0, std::size_t first,
                             std::size_t last, std::size_t kb, const T* packed_a) {
    alignas(64) T acc[kMaxTileBytes / sizeof(T)];
    for (std::size_t j = first; j < last; j += tile.cols) {
      const std::size_t cols = std::min(tile.cols, last - j);
      for (std::size_t i = 0; i < mb; i += tile.rows) {
        const std::size_t rows = std::min(tile.rows, mb - i);
        tile.run(kb, packed_a + i * kb, packed_b.data() + j * kb, acc);
        for (std::size_t r = 0; r < rows; ++r) {
          T* out = c + (i0 + i + r) * c_stride + j0 + j;
          for (std::size_t x = 0; x < cols; ++x) out[x] += acc[r * tile.cols + x];
        }
      }
    }
  };
  for (std::size_t j0 = 0; j0 < n; j0 += block_n) {
    const std::size_t nb = std::min(block_n, n - j0);
    const std::size_t b_slivers = (nb + tile.cols - 1) / tile.cols;
    for (std::size_t p0 = 0; p0 < k; p0 += kBlockK) {
      const std::size_t kb = std::min(kBlockK, k - p0);
      tbb::parallel_for(tbb::blocked_range<std::size_t>(0, b_slivers, 8), [&](const auto& range) {
        const std::size_t first = range.begin() * tile.cols;
        const std::size_t last = std::min(range.end() * tile.cols, nb);
        pack<T>(last - first, kb, tile.cols, T{1}, b.block(p0, j0 + first).transposed(),
                packed_b.data() + first * kb);
      });
      // Blocks of rows times panels of columns, so that there is enough for every thread. A thread
      // packs its rows once for all panels that it takes of them.
      const std::size_t panels = (nb + kPanelN - 1) / kPanelN;
      const tbb::blocked_range2d<std::size_t> blocks(0, (m + kBlockM - 1) / kBlockM, 1, 0, panels,
                                                     1);
      tbb::parallel_for(blocks, [&](const auto& range) {
        const AlignedBuffer<T> packed_a(round_up(std::min(kBlockM, m), tile.rows) * kb);
        for (std::size_t block = range.rows().begin(); block != range.rows().end(); ++block) {
          const std::size_t i0 = block * kBlockM, mb = std::min(kBlockM, m - i0);
          pack<T>(mb, kb, tile.rows, alpha, a.block(i0, p0), packed_a.data());
          for (std::size_t panel = range.cols().begin(); panel != range.cols().end(); ++panel) {
            const std::size_t first = panel * kPanelN, last = std::min(first + kPanelN, nb);
            add_block(i0, mb, j0, first, last, kb, packed_a.data());
          }
        }
      });
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
