// Householder QR in float64, blocked, for the cloak.
#pragma once

#include <cstddef>
#include <span>

namespace infemeral {

// Replaces the n x n matrix `a`, column-major, by its orthogonal factor Q, where A = Q R and R has
// a positive diagonal: with that sign Q is unique, and for a matrix of independent Gaussians it is
// Haar-distributed (Mezzadri, Notices of the AMS 54, 2007). 8/3 n^3 operations, nearly all of them
// matrix products (compact WY form: Schreiber and Van Loan, SIAM J. Sci. Stat. Comput. 10, 1989).
// `a` must have full rank. Scratch copies of its content are wiped.
void orthogonal_factor(std::size_t n, std::span<double> a);

}  // namespace infemeral
