#include "cpu/rotation.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "engine/float16.h"
#include "engine/gemm.h"
#include "engine/text.h"

namespace infemeral {
namespace {

constexpr double kInverseTolerance = 1e-12;
constexpr int kMaxNewtonSteps = 6;

template <typename T>
BasicConstMatrix<T> view(const HugeArray<T>& values, std::size_t cols) {
  return {values.data(), static_cast<std::ptrdiff_t>(cols)};
}

// out = w M for rows of n, and out = Q^T w, for matrices in T.
template <typename T>
void multiply_rows(const HugeArray<T>& m, std::size_t n, std::size_t rows, std::span<const T> w,
                   std::span<T> out) {
  std::fill(out.begin(), out.end(), T{0});
  gemm_add(rows, n, n, T{1}, BasicConstMatrix<T>{w.data(), static_cast<std::ptrdiff_t>(n)},
           view(m, n), out.data(), n);
}
template <typename T>
void fold_write_with(const HugeArray<T>& q, std::size_t n, std::size_t cols, std::span<const T> w,
                     std::span<T> out) {
  std::fill(out.begin(), out.end(), T{0});
  gemm_add(n, cols, n, T{1}, view(q, n).transposed(),
           BasicConstMatrix<T>{w.data(), static_cast<std::ptrdiff_t>(cols)}, out.data(), cols);
}

}  // namespace

absl::StatusOr<Rotation> Rotation::make(const Cloak& cloak) {
  const std::size_t n = cloak.hidden_size(), size = n * n;
  Rotation result(n);
  HugeArray<double>&q = result.q_, &x = result.inverse_transpose_;
  for (std::size_t i = 0; i < size; ++i) q.data()[i] = f16_to_f32(cloak.values()[i]);
  std::copy_n(q.data(), size, x.data());

  HugeArray<double> residual(size), next(size);
  double error = 1;
  for (int step = 0; step <= kMaxNewtonSteps; ++step) {
    // residual = I - Q^T X
    std::fill_n(residual.data(), size, 0.0);
    for (std::size_t i = 0; i < n; ++i) residual.data()[i * n + i] = 1;
    gemm_add(n, n, n, -1.0, view(q, n).transposed(), view(x, n), residual.data(), n);
    error = 0;
    for (const double r : std::span(residual.data(), size)) {
      error = std::fabs(r) <= error ? error : std::fabs(r);
    }
    if (error <= kInverseTolerance || step == kMaxNewtonSteps) break;
    std::copy_n(x.data(), size, next.data());
    gemm_add(n, n, n, 1.0, view(x, n), view(residual, n), next.data(), n);
    std::swap(x, next);
  }
  residual.wipe();
  next.wipe();
  if (!(error <= kInverseTolerance)) {
    return absl::InternalError(
        cat("the cloak's inverse is off by ", error, "; allowed is ", kInverseTolerance));
  }
  std::copy_n(q.data(), size, result.q_f32_.data());
  std::copy_n(x.data(), size, result.inverse_transpose_f32_.data());
  return result;
}

Rotation::~Rotation() {
  q_.wipe();
  inverse_transpose_.wipe();
  q_f32_.wipe();
  inverse_transpose_f32_.wipe();
}

void Rotation::fold_read(std::size_t rows, std::span<const double> w, std::span<double> out) const {
  multiply_rows(inverse_transpose_, n_, rows, w, out);
}
void Rotation::fold_read(std::size_t rows, std::span<const float> w, std::span<float> out) const {
  multiply_rows(inverse_transpose_f32_, n_, rows, w, out);
}

void Rotation::fold_write(std::size_t cols, std::span<const double> w,
                          std::span<double> out) const {
  fold_write_with(q_, n_, cols, w, out);
}
void Rotation::fold_write(std::size_t cols, std::span<const float> w, std::span<float> out) const {
  fold_write_with(q_f32_, n_, cols, w, out);
}

void Rotation::rotate(std::size_t rows, std::span<const double> x, std::span<double> out) const {
  multiply_rows(q_, n_, rows, x, out);
}
void Rotation::rotate(std::size_t rows, std::span<const float> x, std::span<float> out) const {
  multiply_rows(q_f32_, n_, rows, x, out);
}

}  // namespace infemeral
