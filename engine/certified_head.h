// The certified head: the token that the full float16 head gives, from an int8 copy of lm_head and
// a proof. docs/certified-head.md explains it in plain words.
//
// For a row w of lm_head (n values) and a state y, both are rounded to whole numbers:
//
//   w ~ s * q   q in [-127, 127], one scale a row
//   y ~ t * v   v in [-32639, 32639], one scale a state
//
// The sum D = q . v is a sum of whole numbers: exact, in any order, on any device. Let f be what
// the full head computes for this row in float32, and u = 2^-24 its unit roundoff. Then
//
//   f - s t D  =  (f - w.y)  +  w.(y - t v)  +  (w - s q).(t v)
//
//   |f - w.y|         <=  g |w| |y|,  g = n u / (1 - n u), for every order of summation, with or
//                         without fused multiply-add (Higham, "Accuracy and stability of numerical
//                         algorithms", 3.1)
//   |w.(y - t v)|     <=  |w| |y - t v|                                (Cauchy-Schwarz)
//   |(w - s q).(t v)| <=  (s / 2) * sum |t v_j|  over a few j,         (no rounding is worse than
//                         + |w - s q| |t v|  over the other j           half a step)
//
// with Euclidean norms. The few j are the state's outliers, where the last line is the better for
// it. So f lies within  scale * a + error * b + norm * c  of s t D, where scale, error >= |w - s q|
// and norm >= |w| belong to the row, and a, b, c to the state. All are rounded up.
//
// Everything here is plain arithmetic on spans: a device may compute the rows' numbers, D and the
// intervals itself, by the same definitions. The first bound asks that its full head rounds every
// product and sum to nearest float32: units that truncate, as tensor cores do, need a larger u.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "engine/certified_bound.h"
#include "engine/metrics.h"
#include "engine/sampling.h"

namespace infemeral {

// How the head computes tokens from a state.
enum class HeadMode {
  kCertified,  // int8 product, then float16 rows as far as the proof needs them: the full head's
               // token
  kFull,       // the float16 product of every row
  kInt8,       // the int8 product alone: another model, by a little
  kSubset      // the float16 product of the most frequent tokens' rows where it is confident, else
               // of every row: engine/subset_head.h
};
std::string_view head_mode_name(HeadMode mode);  // "certified", "full", "int8", "subset"
std::optional<HeadMode> parse_head_mode(std::string_view name);

// Writes q (row.size() values). For rows whose values are binary16 numbers. A row with a value that
// is not finite gets q = 0 and the norm infinity, which no state is certifiable with.
RowBound quantise_row(std::span<const float> row, std::span<std::int8_t> q);

// Writes v (state.size() values). nullopt when the proof does not cover the state: it is all but
// zero (below 2^-60), products with the largest row could leave the range in which float32 rounds
// as the proof says, or it has more than 2^20 values. `largest_norm` is the largest RowBound::norm.
std::optional<StateBound> quantise_state(std::span<const float> state, float largest_norm,
                                         std::span<std::int16_t> v);

// Chooses a token from intervals of logits, which several threads may bring while they compute
// them: start(), observe() for every token once, finish(). One row at a time; keeps its buffers.
class CertifiedSampler {
 public:
  // Tokens in a call of observe, at most.
  static constexpr std::size_t kBlock = 64;

  // Replaces every candidate's score by the full head's logit of its id, with the same bits.
  using Rescore = std::function<void(std::span<Candidate>)>;

  CertifiedSampler();
  ~CertifiedSampler();
  CertifiedSampler(CertifiedSampler&&) noexcept;
  CertifiedSampler& operator=(CertifiedSampler&&) noexcept;

  // The request's history must live until finish(). At least one worker.
  void start(const SampleRequest& request, std::size_t vocab_size, std::size_t workers);

  // The tokens first, first + 1, ...: lower[i] <= the full head's logit <= upper[i], both finite;
  // overwritten as scratch. As many of both, at most kBlock; `first` is a multiple of kBlock. Calls
  // for different workers (below start's number) may run at the same time.
  void observe(std::size_t worker, std::size_t first, std::span<float> lower,
               std::span<float> upper);

  // The token that Sampler::sample gives for the full head's logits: it depends neither on the
  // order of the calls of observe nor on who made them. nullopt when that token cannot be shown,
  // or not with fewer rows than pay: run the full head then. Adds to the rows and the widenings of
  // `counters`; tokens and full passes are the caller's to count.
  std::optional<std::int32_t> finish(const Rescore& rescore, HeadCounters& counters);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace infemeral
