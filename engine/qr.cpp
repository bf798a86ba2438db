#include "engine/qr.h"

#include <sodium.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "engine/gemm.h"

namespace infemeral {
namespace {

constexpr std::size_t kPanel = 64;  // columns that are reduced before the rest is updated

// Eight sums instead of one: the compiler may not reorder a sum by itself.
double dot(const double* x, const double* y, std::size_t n) {
  constexpr std::size_t kSums = 8;
  double sums[kSums] = {};
  std::size_t i = 0;
  for (; i + kSums <= n; i += kSums) {
    for (std::size_t s = 0; s < kSums; ++s) sums[s] += x[i + s] * y[i + s];
  }
  double total = 0;
  for (; i < n; ++i) total += x[i] * y[i];
  for (const double sum : sums) total += sum;
  return total;
}

void add_scaled(double factor, const double* x, double* y, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) y[i] += factor * x[i];
}

// The reflectors of one panel, H_0 H_1 ... H_(w-1) = I - V T V^T, with V height x width,
// column-major, and T upper triangular.
struct Panel {
  std::size_t start = 0, width = 0, height = 0;
  std::vector<double> v;
  double t[kPanel][kPanel] = {};
};

// Reduces columns [start, start + width) of a; writes the signs of R's diagonal.
Panel reduce_panel(std::size_t n, std::span<double> a, std::size_t start, std::span<double> signs) {
  Panel panel{start, std::min(kPanel, n - start), n - start, {}, {}};
  panel.v.assign(panel.width * panel.height, 0);
  for (std::size_t j = 0; j < panel.width; ++j) {
    double* column = a.data() + (start + j) * n + start;
    double* v = panel.v.data() + j * panel.height;
    const std::size_t length = panel.height - j;
    // v = x + sign(x_0) |x| e_0, so that nothing cancels; H x = -sign(x_0) |x| e_0.
    const double norm = std::sqrt(dot(column + j, column + j, length));
    const double head = column[j] + std::copysign(norm, column[j]);
    signs[start + j] = column[j] < 0 ? 1 : -1;
    v[j] = 1;
    for (std::size_t i = j + 1; i < panel.height; ++i) v[i] = column[i] / head;
    const double tau = 2 / dot(v + j, v + j, length);
    for (std::size_t other = j + 1; other < panel.width; ++other) {
      double* target = a.data() + (start + other) * n + start + j;
      add_scaled(-tau * dot(v + j, target, length), v + j, target, length);
    }
    // T's next column: -tau T (V^T v), and tau on the diagonal.
    double products[kPanel];
    for (std::size_t i = 0; i < j; ++i) {
      products[i] = dot(panel.v.data() + i * panel.height + j, v + j, length);
    }
    for (std::size_t i = 0; i < j; ++i) {
      for (std::size_t p = i; p < j; ++p) panel.t[i][j] -= tau * panel.t[i][p] * products[p];
    }
    panel.t[j][j] = tau;
  }
  return panel;
}

// Columns [first, n) of the column-major matrix, rows from panel.start on:
//   C := (I - V T V^T) C, or with T transposed.
// In memory that is C^T := C^T - (C^T V) T^T V^T with C^T row-major.
void apply(const Panel& panel, bool transpose_t, std::size_t n, std::size_t first,
           std::span<double> matrix) {
  if (first >= n) return;
  const std::size_t columns = n - first, width = panel.width;
  const auto height = static_cast<std::ptrdiff_t>(panel.height);
  double* c = matrix.data() + first * n + panel.start;
  const ConstMatrix c_t{c, static_cast<std::ptrdiff_t>(n)};
  const ConstMatrix v{panel.v.data(), 1, height};
  const ConstMatrix t{panel.t[0], kPanel};
  std::vector<double> products(columns * width, 0), weights(columns * width, 0);
  const ConstMatrix products_view{products.data(), static_cast<std::ptrdiff_t>(width)};
  gemm_add(columns, width, panel.height, 1.0, c_t, v, products.data(), width);
  gemm_add(columns, width, width, 1.0, products_view, transpose_t ? t : t.transposed(),
           weights.data(), width);
  gemm_add(columns, panel.height, width, -1.0, {weights.data(), products_view.row_stride},
           v.transposed(), c, n);
  sodium_memzero(products.data(), products.size() * sizeof(double));
  sodium_memzero(weights.data(), weights.size() * sizeof(double));
}

}  // namespace

void orthogonal_factor(std::size_t n, std::span<double> a) {
  std::vector<Panel> panels;
  std::vector<double> signs(n);
  for (std::size_t start = 0; start < n; start += kPanel) {
    panels.push_back(reduce_panel(n, a, start, signs));
    // H^T = I - V T^T V^T on the columns that are still to come.
    apply(panels.back(), true, n, start + panels.back().width, a);
  }

  std::fill(a.begin(), a.end(), 0.0);
  for (std::size_t i = 0; i < n; ++i) a[i * n + i] = 1;
  for (auto panel = panels.rbegin(); panel != panels.rend(); ++panel) {
    apply(*panel, false, n, panel->start, a);
    sodium_memzero(panel->v.data(), panel->v.size() * sizeof(double));
    sodium_memzero(panel->t, sizeof panel->t);
  }
  for (std::size_t j = 0; j < n; ++j) {
    for (std::size_t i = 0; i < n; ++i) a[j * n + i] *= signs[j];
  }
}

}  // namespace infemeral
