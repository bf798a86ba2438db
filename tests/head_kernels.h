// The kernels between a returned row and its token, one at a time, for tests and benchmarks: the
// buffers of a client, and each call as kernels/client_stages.cpp makes it. Host code; a call that
// fails throws std::runtime_error.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "kernels/call_buffers.h"
#include "kernels/client_shape.h"
#include "kernels/client_weights.h"
#include "kernels/device.h"
#include "kernels/full_head.h"
#include "kernels/int8_head.h"
#include "kernels/mailbox.h"
#include "kernels/sample.h"
#include "kernels/wire.h"

namespace infemeral {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}
inline void check(const absl::Status& status) {
  if (!status.ok()) throw std::runtime_error(std::string(status.message()));
}
template <typename T>
T value(absl::StatusOr<T> result) {
  check(result.status());
  return *std::move(result);
}

// For any shape up to a size. Calls are about the first n rows and go to the stage's stream.
class HeadKernels {
 public:
  HeadKernels(const cuda::Stage& where, std::size_t max_vocab, std::size_t max_hidden)
      : stage(where) {
    reshape(static_cast<int>(max_vocab), static_cast<int>(max_hidden));
    const std::size_t k = cuda::kMaxRows, v = cuda::int8_rows(max_vocab), s = shape.stride;
    buffers = value(cuda::make_call_buffers(shape, true, usage));
    device(weights.lm_head, v * s);
    device(weights.copy, v * s);
    device(weights.bounds, v);
    device(weights.largest_norm, 1);
    pinned(seen, k * shape.seen_words);
    pinned(requests, k);
    pinned(results, k);
    pinned(wire, k * wire_row_bytes(WireDtype::kF32, s));
  }

  template <typename T>
  void device(cuda::Array<T>& array, std::size_t size) {
    check(cuda::allocate(array, cuda::Place::kDevice, size, usage));
  }
  template <typename T>
  void pinned(cuda::Array<T>& array, std::size_t size) {
    check(cuda::allocate(array, cuda::Place::kPinned, size, usage));
  }

  void reshape(int vocab_size, int hidden_size) {
    shape = cuda::client_shape(hidden_size, vocab_size);
  }
  void write_request(int i, const SampleRequest& request, std::uint32_t sequence) {
    requests[i] = cuda::row_request(request, shape.vocab_size, sequence);
    cuda::mark_seen(request.history, shape.vocab_size,
                    seen.data() + static_cast<std::size_t>(i) * shape.seen_words);
  }
  void wait() { check(cudaStreamSynchronize(stage.stream), "the kernels"); }

  // The int8 copy of lm_head, rounded in calls of `piece` rows, a multiple of kGroupRows or all.
  void quantise_rows(int piece) {
    check(cudaMemsetAsync(weights.largest_norm.data(), 0, sizeof(float), stage.stream), "memset");
    for (int first = 0; first < shape.vocab_size; first += piece) {
      check(cuda::quantise_rows(stage,
                                {.rows = weights.lm_head.data() + std::size_t(first) * shape.stride,
                                 .vocab_size = shape.vocab_size,
                                 .first = first,
                                 .count = std::min(piece, shape.vocab_size - first),
                                 .hidden_size = shape.hidden_size,
                                 .stride = shape.stride,
                                 .copy = weights.copy.data(),
                                 .bounds = weights.bounds.data(),
                                 .largest_norm = weights.largest_norm.data()}),
            "quantise_rows");
    }
  }
  void decode(int n) {
    check(cuda::decode(stage, {.wire = wire.data(),
                               .requests = requests.data(),
                               .seen = seen.data(),
                               .seen_copy = buffers.seen.data(),
                               .seen_words = shape.seen_words,
                               .dtype = WireDtype::kF16,
                               .states = n,
                               .hidden_size = shape.hidden_size,
                               .stride = shape.stride,
                               .out = buffers.cloaked.data(),
                               .split = buffers.planes_of_rows(),
                               .rows = buffers.rows.data()}),
          "decode");
  }
  // `packed`: kernels/rotate.h.
  void uncloak(int n, const __half* packed) {
    check(cuda::rotate(stage, {.matrix = packed,
                               .rows = shape.hidden_size,
                               .stride = shape.stride,
                               .states = buffers.planes_of_rows(),
                               .n = n,
                               .out = buffers.states.data(),
                               .started = &buffers.rows.data()->times.uncloak}),
          "uncloak");
  }
  void int8_head(int n, bool approximate = false) {
    check(cuda::int8_head(stage, {.states = buffers.states.data(),
                                  .n = n,
                                  .hidden_size = shape.hidden_size,
                                  .stride = shape.stride,
                                  .vocab_size = shape.vocab_size,
                                  .copy = weights.copy.data(),
                                  .bounds = weights.bounds.data(),
                                  .largest_norm = weights.largest_norm.data(),
                                  .planes = buffers.planes.data(),
                                  .seen = buffers.seen.data(),
                                  .seen_words = shape.seen_words,
                                  .rows = buffers.rows.data(),
                                  .lower = buffers.lower.data(),
                                  .upper = buffers.upper.data(),
                                  .approximate = approximate}),
          "int8_head");
  }
  void full_head(int n) {
    check(cuda::full_head(stage, {.lm_head = weights.lm_head.data(),
                                  .vocab_size = shape.vocab_size,
                                  .stride = shape.stride,
                                  .states = buffers.states.data(),
                                  .n = n,
                                  .logits = buffers.upper.data(),
                                  .started = &buffers.rows.data()->times.de_embed}),
          "full_head");
  }
  // The last three with `known`: after full_head.
  void score_logits(int n) { check(cuda::score_logits(stage, sampling(n, true)), "score_logits"); }
  void scan(int n, bool known = false) { check(cuda::scan(stage, sampling(n, known)), "scan"); }
  void select(int n, bool chooses, bool known = false) {
    check(cuda::select(stage, sampling(n, known), chooses), "select");
  }
  void forget_candidates(int n) {
    for (int i = 0; i < n; ++i) {
      check(cuda::forget_candidates(stage, buffers.rows.data() + i), "forget_candidates");
    }
  }
  void choose_full(int n) { check(cuda::choose_full(stage, sampling(n)), "choose_full"); }

  const cuda::Stage stage;
  cuda::DeviceUsage usage;  // before everything that reports to it
  cuda::ClientShape shape;
  cuda::ClientWeights weights;  // lm_head: zeros, to be filled; no other table
  cuda::CallBuffers buffers;
  cuda::Array<std::uint32_t> seen;
  cuda::Array<cuda::RowRequest> requests;
  cuda::Array<cuda::RowResult> results;
  cuda::Array<std::byte> wire;  // returned rows

 private:
  cuda::Sample sampling(int n, bool known = false) const {
    return {.n = n,
            .vocab_size = shape.vocab_size,
            .stride = shape.stride,
            .rows = buffers.rows.data(),
            .lower = known ? buffers.upper.data() : buffers.lower.data(),
            .upper = buffers.upper.data(),
            .lm_head = weights.lm_head.data(),
            .states = buffers.states.data(),
            .seen = buffers.seen.data(),
            .seen_words = shape.seen_words,
            .candidates = buffers.candidates.data(),
            .results = results.data(),
            .tokens = buffers.tokens.data(),
            .known = known};
  }
};

}  // namespace infemeral
