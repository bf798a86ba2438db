// The cloak folded into weights: in float64, or, for bodies that are stored in fewer bits, with
// the same matrices in float32, whose error (about 1e-6 of a row) is lost in what such a body
// rounds.
//
// The client multiplies by the *float16* matrix Q, which is orthogonal only to about 1e-4. So what
// reads the residual stream is folded with Q's exact inverse, and nothing is lost inside the body:
//
//   reads  (q, k, v, gate, up)   W' = W diag(gain) Q^-T    W' (x Q)^T = W diag(gain) x^T, exactly
//   writes (o, down)             W' = Q^T W                (a W'^T)   = (a W^T) Q,        exactly
//   biases that are written      b' = b Q
//
// What remains is the norm's argument: |xQ| differs from |x| by about 1e-5 of it, far below what
// float16 weights or states can hold. (With Q in the place of Q^-T each read would be off by
// |QQ^T - I|, about 2e-4 of its norm; a test shows both.)
#pragma once

#include <cstddef>
#include <span>

#include "absl/status/statusor.h"
#include "cpu/huge_pages.h"
#include "engine/cloak.h"

namespace infemeral {

// Wiped when destroyed. Immutable; products run on oneTBB's threads of the calling arena.
class Rotation {
 public:
  // Inverts Q by Newton's iteration, X <- X (2I - Q^T X) for X = Q^-T from X = Q; the error squares
  // each time (Schulz, ZAMM 13, 1933). Internal when it does not reach 1e-12.
  static absl::StatusOr<Rotation> make(const Cloak& cloak);
  Rotation(Rotation&&) noexcept = default;
  Rotation& operator=(Rotation&&) = delete;
  ~Rotation();

  std::size_t hidden_size() const { return n_; }
  // out = w Q^-T for `rows` rows of H, both row-major and apart.
  void fold_read(std::size_t rows, std::span<const double> w, std::span<double> out) const;
  void fold_read(std::size_t rows, std::span<const float> w, std::span<float> out) const;
  // out = Q^T w for w of H x cols, both row-major and apart.
  void fold_write(std::size_t cols, std::span<const double> w, std::span<double> out) const;
  void fold_write(std::size_t cols, std::span<const float> w, std::span<float> out) const;
  // out = x Q for `rows` rows of H: a bias, states as the client sends them, or its embeddings.
  void rotate(std::size_t rows, std::span<const double> x, std::span<double> out) const;
  void rotate(std::size_t rows, std::span<const float> x, std::span<float> out) const;

 private:
  explicit Rotation(std::size_t n)
      : n_(n), q_(n * n), inverse_transpose_(n * n), q_f32_(n * n), inverse_transpose_f32_(n * n) {}
  std::size_t n_;
  HugeArray<double> q_;                  // Q, row-major
  HugeArray<double> inverse_transpose_;  // Q^-T, row-major
  HugeArray<float> q_f32_, inverse_transpose_f32_;
};

}  // namespace infemeral
