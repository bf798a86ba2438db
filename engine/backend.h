// What a compute backend does for the client: the two ends of the model that touch text. A backend
// owns its weights and its device; calls are coarse so that each backend can fuse as it likes.
//
// Notation: H hidden size, V vocabulary size, Q the H x H cloak, row vectors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "absl/status/status.h"
#include "engine/metrics.h"
#include "engine/sampling.h"
#include "engine/wire.h"

namespace infemeral {

// Not thread-safe: one caller at a time. Lives on its own; holds its weights until destroyed.
class ClientBackend {
 public:
  virtual ~ClientBackend() = default;

  // A short name for logs and reports: "cpu (avx512)", "cuda (NVIDIA H100)".
  virtual std::string_view name() const = 0;
  virtual std::size_t hidden_size() const = 0;  // H
  virtual std::size_t vocab_size() const = 0;   // V
  virtual MemoryUse memory() const = 0;
  // All 0 for a backend, or a head mode, that neither certifies nor guesses.
  virtual HeadCounters head_counters() const { return {}; }

  // Rows E[id] * Q in the wire format: out holds ids.size() * wire_row_bytes(dtype, H) bytes. Every
  // backend writes the same ones, those of exact sums (engine/wire_edges.h); not so with noise or
  // folded tables. Adds to times.embed_ms and times.cloak_ms (the encoding is part of cloak).
  // InvalidArgument for an id outside [0, V).
  virtual absl::Status embed(std::span<const std::int32_t> ids, WireDtype dtype,
                             std::span<std::byte> out, PhaseTimes& times) = 0;

  // One returned row per request -> one token each: tokens[i] is sampled from
  // lm_head * (gain * (rows[i] * Q^T)). rows holds requests.size() * wire_row_bytes(dtype, H)
  // bytes. Adds to times.decode_ms, uncloak_ms, de_embed_ms and sample_ms. InvalidArgument when
  // sizes do not fit, DataLoss when a row is not finite.
  virtual absl::Status next_tokens(std::span<const std::byte> rows, WireDtype dtype,
                                   std::span<const SampleRequest> requests,
                                   std::span<std::int32_t> tokens, PhaseTimes& times) = 0;

  // The logits of one returned row that a token is sampled from, for tests and evaluation; logits
  // holds V floats. Certified and full heads: those of the float16 product. Int8: what its product
  // stands for. Subset: those of the float16 product, and minus infinity outside the subset where a
  // greedy request without a repetition penalty is answered from the subset alone.
  virtual absl::Status logits(std::span<const std::byte> row, WireDtype dtype,
                              std::span<float> logits) = 0;
};

}  // namespace infemeral
