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

void wipe(std::vector<double>& values) {
  sodium_memzero(values.data(), values.size() * sizeof(double));
}

ConstMatrix view(std::span<const double> values, std::size_t cols) {
  return {values.data(), static_cast<std::ptrdiff_t>(cols)};
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
    gemm_add(n, n, n, -1, view(result.q_, n).transposed(), view(x, n), residual.data(), n);
    error = 0;
    for (const double r : residual) error = std::fabs(r) <= error ? error : std::fabs(r);
    if (error <= kInverseTolerance || step == kMaxNewtonSteps) break;
    next = x;
    gemm_add(n, n, n, 1, view(x, n), view(residual, n), next.data(), n);
    std::swap(x, next);
  }
  wipe(residual);
  wipe(next);
  if (!(error <= kInverseTolerance)) {
    return absl::InternalError(
        cat("the cloak's inverse is off by ", error, "; allowed is ", kInverseTolerance));
  }
  return result;
}

Rotation::~Rotation() {
  wipe(q_);
  wipe(inverse_transpose_);
}

void Rotation::fold_read(std::size_t rows, std::span<const double> w, std::span<double> out) const {
  std::fill(out.begin(), out.end(), 0.0);
  gemm_add(rows, n_, n_, 1, view(w, n_), view(inverse_transpose_, n_), out.data(), n_);
}

void Rotation::fold_write(std::size_t cols, std::span<const double> w,
                          std::span<double> out) const {
  std::fill(out.begin(), out.end(), 0.0);
  gemm_add(n_, cols, n_, 1, view(q_, n_).transposed(), view(w, cols), out.data(), cols);
}

void Rotation::rotate(std::size_t rows, std::span<const double> x, std::span<double> out) const {
  std::fill(out.begin(), out.end(), 0.0);
  gemm_add(rows, n_, n_, 1, view(x, n_), view(q_, n_), out.data(), n_);
}

}  // namespace infemeral
