#include "cpu/rotation.h"

#include <sodium.h>

#include <algorithm>
#include <cmath>

#include "engine/float16.h"
#include "engine/gemm.h"
#include "engine/text.h"

namespace infemeral {
namespace {

constexpr double kInverseTolerance = 1e-12;
constexpr int kMaxNewtonSteps = 6;

template <typename T>
void wipe(std::vector<T>& values) {
  sodium_memzero(values.data(), values.size() * sizeof(T));
}

template <typename T>
BasicConstMatrix<T> view(const std::vector<T>& values, std::size_t cols) {
  return {values.data(), static_cast<std::ptrdiff_t>(cols)};
}

// out = w M for rows of n, and out = Q^T w, for matrices in T.
template <typename T>
void multiply_rows(const std::vector<T>& m, std::size_t n, std::size_t rows, std::span<const T> w,
                   std::span<T> out) {
  std::fill(out.begin(), out.end(), T{0});
  gemm_add(rows, n, n, T{1}, BasicConstMatrix<T>{w.data(), static_cast<std::ptrdiff_t>(n)},
           view(m, n), out.data(), n);
}
template <typename T>
void fold_write_with(const std::vector<T>& q, std::size_t n, std::size_t cols, std::span<const T> w,
                     std::span<T> out) {
  std::fill(out.begin(), out.end(), T{0});
  gemm_add(n, cols, n, T{1}, view(q, n).transposed(),
           BasicConstMatrix<T>{w.data(), static_cast<std::ptrdiff_t>(cols)}, out.data(), cols);
}

}  // namespace

absl::StatusOr<Rotation> Rotation::make(const Cloak& cloak) {
  Rotation result;
  const std::size_t n = result.n_ = cloak.hidden_size();
  result.q_.resize(n * n);
  for (std::size_t i = 0; i < n * n; ++i) result.q_[i] = f16_to_f32(cloak.values()[i]);
  result.inverse_transpose_ = result.q_;

  std::vector<double>& x = result.inverse_transpose_;
  std::vector<double> residual(n * n), next(n * n);
  double error = 1;
  for (int step = 0; step <= kMaxNewtonSteps; ++step) {
    // residual = I - Q^T X
    std::fill(residual.begin(), residual.end(), 0.0);
    for (std::size_t i = 0; i < n; ++i) residual[i * n + i] = 1;
    gemm_add(n, n, n, -1.0, view(result.q_, n).transposed(), view(x, n), residual.data(), n);
    error = 0;
    for (const double r : residual) error = std::fabs(r) <= error ? error : std::fabs(r);
    if (error <= kInverseTolerance || step == kMaxNewtonSteps) break;
    next = x;
    gemm_add(n, n, n, 1.0, view(x, n), view(residual, n), next.data(), n);
    std::swap(x, next);
  }
  wipe(residual);
  wipe(next);
  if (!(error <= kInverseTolerance)) {
    return absl::InternalError(
        cat("the cloak's inverse is off by ", error, "; allowed is ", kInverseTolerance));
  }
  result.q_f32_.assign(result.q_.begin(), result.q_.end());
  result.inverse_transpose_f32_.assign(x.begin(), x.end());
  return result;
}

Rotation::~Rotation() {
  wipe(q_);
  wipe(inverse_transpose_);
  wipe(q_f32_);
  wipe(inverse_transpose_f32_);
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
