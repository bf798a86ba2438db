#include "engine/gemm.h"

#include <sodium.h>

#include <oneapi/tbb/blocked_range.h>
#include <oneapi/tbb/parallel_for.h>

#include <algorithm>
#include <new>
#include <vector>

#include "engine/gemm_kernel.h"

namespace infemeral {
namespace {

// Block sizes: a packed panel of A (kBlockM x kBlockK, 512 KiB) stays in the L2 of its core, a
// sliver of B (kBlockK x tile columns) in the L1.
constexpr std::size_t kBlockM = 256;
constexpr std::size_t kBlockK = 256;
constexpr std::size_t kBlockN = 4096;
constexpr std::size_t kMaxTile = 8 * 24;

GemmKernel choose_kernel() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return gemm_kernel_avx512();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return gemm_kernel_avx2();
#endif
  return gemm_kernel_baseline();
}

const GemmKernel& kernel() {
  static const GemmKernel chosen = choose_kernel();
  return chosen;
}

// Wiped when freed: what is multiplied may be the cloak.
class AlignedBuffer {
 public:
  explicit AlignedBuffer(std::size_t n)
      : bytes_(n * sizeof(double)),
        data_(static_cast<double*>(::operator new (bytes_, std::align_val_t{kAlignment}))) {}
  ~AlignedBuffer() {
    sodium_memzero(data_, bytes_);
    ::operator delete (data_, std::align_val_t{kAlignment});
  }
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;
  double* data() const { return data_; }

 private:
  static constexpr std::size_t kAlignment = 64;
  const std::size_t bytes_;
  double* data_;
};

std::size_t round_up(std::size_t n, std::size_t step) {
  return (n + step - 1) / step * step;
}

// Packs `lines` x k elements into slivers of `width` lines: p-major inside a sliver, missing lines
// as zeros. For A a line is a row; for B, seen transposed, a column.
void pack(std::size_t lines, std::size_t k, std::size_t width, double scale, ConstMatrix m,
          double* out) {
  for (std::size_t first = 0; first < lines; first += width) {
    const std::size_t count = std::min(width, lines - first);
    const ConstMatrix sliver = m.block(first, 0);
    for (std::size_t p = 0; p < k; ++p) {
      const double* source = sliver.data + static_cast<std::ptrdiff_t>(p) * sliver.col_stride;
      for (std::size_t i = 0; i < count; ++i) {
        out[i] = scale * source[static_cast<std::ptrdiff_t>(i) * sliver.row_stride];
      }
      std::fill(out + count, out + width, 0.0);
      out += width;
    }
  }
}

}  // namespace

void gemm_add(std::size_t m, std::size_t n, std::size_t k, double alpha, ConstMatrix a,
              ConstMatrix b, double* c, std::size_t c_stride) {
  const GemmKernel& tile = kernel();
  const std::size_t block_n = std::min(kBlockN, n);
  const AlignedBuffer packed_b(round_up(block_n, tile.cols) * kBlockK);
  for (std::size_t j0 = 0; j0 < n; j0 += block_n) {
    const std::size_t nb = std::min(block_n, n - j0);
    const std::size_t b_slivers = (nb + tile.cols - 1) / tile.cols;
    for (std::size_t p0 = 0; p0 < k; p0 += kBlockK) {
      const std::size_t kb = std::min(kBlockK, k - p0);
      tbb::parallel_for(tbb::blocked_range<std::size_t>(0, b_slivers, 8), [&](const auto& range) {
        const std::size_t first = range.begin() * tile.cols;
        const std::size_t last = std::min(range.end() * tile.cols, nb);
        pack(last - first, kb, tile.cols, 1, b.block(p0, j0 + first).transposed(),
             packed_b.data() + first * kb);
      });
      // Rows in blocks small enough that every thread gets some.
      const std::size_t mb_max = std::min(kBlockM, round_up(std::max<std::size_t>(m / 16, 1), 32));
      const std::size_t blocks = (m + mb_max - 1) / mb_max;
      tbb::parallel_for(tbb::blocked_range<std::size_t>(0, blocks, 1), [&](const auto& range) {
        const AlignedBuffer packed_a(round_up(mb_max, tile.rows) * kb);
        alignas(64) double acc[kMaxTile];
        for (std::size_t block = range.begin(); block != range.end(); ++block) {
          const std::size_t i0 = block * mb_max;
          const std::size_t mb = std::min(mb_max, m - i0);
          pack(mb, kb, tile.rows, alpha, a.block(i0, p0), packed_a.data());
          for (std::size_t j = 0; j < nb; j += tile.cols) {
            const std::size_t cols = std::min(tile.cols, nb - j);
            for (std::size_t i = 0; i < mb; i += tile.rows) {
              const std::size_t rows = std::min(tile.rows, mb - i);
              tile.run(kb, packed_a.data() + i * kb, packed_b.data() + j * kb, acc);
              for (std::size_t r = 0; r < rows; ++r) {
                double* out = c + (i0 + i + r) * c_stride + j0 + j;
                for (std::size_t x = 0; x < cols; ++x) out[x] += acc[r * tile.cols + x];
              }
            }
          }
        }
      });
    }
  }
}

std::string_view gemm_kernel_name() {
  return kernel().name;
}

}  // namespace infemeral
