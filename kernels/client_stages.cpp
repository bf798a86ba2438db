#include "kernels/client_stages.h"

#include <algorithm>
#include <cmath>

#include "kernels/device.h"
#include "kernels/rotate.h"

namespace infemeral::cuda {

// Of |x|: how far a fine sum of x * Q is from the exact one, at most. From H = 64 to 8,192 eight
// standard deviations and more, as measured on an H200.
static float sum_error(int hidden_size) {
  return 0x1p-26f + 0x1p-21f / std::sqrt(static_cast<float>(hidden_size));
}

// --- embed, cloak ---

absl::Status ClientStages::embed_rows(int n, WireDtype dtype) const {
  for (int first = 0; first < n; first += kMaxRows) {
    Embed rows = lookup(state_.mailbox.ids() + first, first, std::min(kMaxRows, n - first));
    if (first == 0) rows.times = state_.mailbox.lookup_times();
    INFEMERAL_RETURN(embed_and_cloak(rows, first));
  }
  return encode(n, dtype, state_.mailbox.outgoing_rows());
}

// To rows [first, first + n) of the embedded ones.
Embed ClientStages::lookup(const std::int32_t* ids, int first, int n) const {
  return {.ids = ids,
          .rows = n,
          .table = state_.weights.embedding_table(),
          .vocab_size = state_.shape.vocab_size,
          .stride = state_.shape.stride,
          .out = state_.buffers.half_rows.data() + row_offset(first),
          .split = state_.buffers.planes_of_rows()};
}

// x * Q for up to kMaxRows rows.
absl::Status ClientStages::embed_and_cloak(const Embed& rows, int first) const {
  INFEMERAL_CUDA(embed(stage(), rows));
  INFEMERAL_CUDA(rotate(stage(), {.matrix = state_.cloak.transposed.data(),
                                  .rows = state_.shape.hidden_size,
                                  .stride = state_.shape.stride,
                                  .states = rows.split,
                                  .n = rows.rows,
                                  .fine = true,
                                  .out = state_.buffers.embedded.data() + row_offset(first)}));
  return absl::OkStatus();
}

absl::Status ClientStages::encode(int n, WireDtype dtype, const Outgoing& to) const {
  if (options_.cloak_noise > 0) {
    INFEMERAL_CUDA(add_noise(stage(), {.rows = state_.buffers.embedded.data(),
                                       .n = n,
                                       .hidden_size = state_.shape.hidden_size,
                                       .stride = state_.shape.stride,
                                       .level = options_.cloak_noise,
                                       .key = options_.noise_key,
                                       .sequence = to.sequence}));
  }
  INFEMERAL_CUDA(cuda::encode(
      stage(), {.in = state_.buffers.embedded.data(),
                .plain = state_.buffers.half_rows.data(),
                .matrix = options_.cloak_noise > 0 ? nullptr : state_.cloak.transposed.data(),
                .sum_error = sum_error(state_.shape.hidden_size),
                .rows = n,
                .hidden_size = state_.shape.hidden_size,
                .stride = state_.shape.stride,
                .dtype = dtype,
                .wire = to.wire,
                .done = to.done,
                .sequence = to.sequence,
                .finished = state_.buffers.encoded_blocks.data()}));
  return absl::OkStatus();
}

// --- decode, uncloak ---

absl::Status ClientStages::uncloak_rows(int n, WireDtype dtype) const {
  INFEMERAL_RETURN(decode(n, dtype));
  return uncloak(n, dtype);
}

absl::Status ClientStages::decode(int n, WireDtype dtype) const {
  INFEMERAL_CUDA(cuda::decode(stage(), {.wire = state_.mailbox.returned_rows(),
                                        .requests = state_.mailbox.requests(),
                                        .seen = state_.mailbox.seen(),
                                        .seen_copy = state_.buffers.seen.data(),
                                        .seen_words = state_.shape.seen_words,
                                        .dtype = dtype,
                                        .states = n,
                                        .hidden_size = state_.shape.hidden_size,
                                        .stride = state_.shape.stride,
                                        .out = state_.buffers.cloaked.data(),
                                        .split = state_.buffers.planes_of_rows(),
                                        .rows = state_.buffers.rows.data()}));
  return absl::OkStatus();
}

// The states that lm_head is multiplied with, gain * (y' * Q^T).
absl::Status ClientStages::uncloak(int n, WireDtype dtype) const {
  const Rotate product = {.matrix = state_.cloak.packed.data(),
                          .rows = state_.shape.hidden_size,
                          .stride = state_.shape.stride,
                          .states = state_.buffers.planes_of_rows(),
                          .n = n,
                          .out = state_.buffers.states.data(),
                          .gain = state_.weights.gain.data(),
                          .started = &state_.buffers.rows.data()->times.uncloak};
  if (dtype == WireDtype::kF32) return refine(product);
  INFEMERAL_CUDA(rotate(stage(), product));
  return absl::OkStatus();
}

// One step of iterative refinement, as cpu/client_backend.cpp explains:
// y = y' Q^T, then y += (y' - y Q) Q^T; the gain comes last.
absl::Status ClientStages::refine(const Rotate& product) const {
  const Split split = state_.buffers.planes_of_rows();
  Rotate first = product;
  first.gain = nullptr;
  INFEMERAL_CUDA(rotate(stage(), first));
  INFEMERAL_CUDA(
      split_states(stage(), {state_.buffers.states.data(), first.n, first.stride, split}));
  Rotate back = first;
  back.started = nullptr;
  back.matrix = state_.cloak.transposed.data();
  back.out = state_.buffers.residual.data();
  back.add = state_.buffers.cloaked.data();
  back.sign = -1;
  INFEMERAL_CUDA(rotate(stage(), back));
  INFEMERAL_CUDA(
      split_states(stage(), {state_.buffers.residual.data(), first.n, first.stride, split}));
  Rotate correct = product;
  correct.started = nullptr;
  correct.add = state_.buffers.states.data();
  INFEMERAL_CUDA(rotate(stage(), correct));
  return absl::OkStatus();
}

// --- de_embed, sample ---

absl::Status ClientStages::next_token(const HeadKey& key) const {
  INFEMERAL_RETURN(uncloak_rows(key.rows, key.dtype));
  INFEMERAL_RETURN(de_embed_and_sample(key));
  if (key.rows > 1) return absl::OkStatus();
  // The token's own cloaked row, which the next step will ask for.
  INFEMERAL_RETURN(embed_and_cloak(lookup(state_.buffers.tokens.data(), 0, 1), 0));
  return encode(1, key.dtype,
                state_.mailbox.outgoing_next_row(&state_.buffers.rows.data()->request.sequence));
}

absl::Status ClientStages::de_embed_and_sample(const HeadKey& key) const {
  Sample args = sampling(0, key.rows);
  switch (options_.mode) {
    case HeadMode::kInt8:  // all its logits are approximate: there is no other head's token to find
      INFEMERAL_RETURN(de_embed_int8(key.rows));
      args.need_proof = true;
      INFEMERAL_CUDA(cuda::choose_full(stage(), args));
      return absl::OkStatus();
    case HeadMode::kCertified:
      INFEMERAL_RETURN(de_embed_int8(key.rows));
      break;
    default:
      INFEMERAL_RETURN(de_embed_full(0, key.rows));
      args.lower = args.upper;
      args.known = true;
  }
  return sample(args, key.scans, key.chooses);
}

absl::Status ClientStages::sample(const Sample& args, bool scans, bool chooses) const {
  if (args.known) INFEMERAL_CUDA(score_logits(stage(), args));
  if (scans) INFEMERAL_CUDA(scan(stage(), args));
  INFEMERAL_CUDA(select(stage(), args, chooses));
  return absl::OkStatus();
}

absl::Status ClientStages::choose_full(int i, const RowRequest& request) const {
  Sample args = sampling(i, 1);
  args.lower = args.upper;
  args.known = true;
  INFEMERAL_CUDA(forget_candidates(stage(), args.rows));
  INFEMERAL_RETURN(de_embed_full(i, 1));
  return sample(args, needs_scan(request.selection), request.selection != Selection::kGreedy);
}

absl::Status ClientStages::choose_among_all(int i) const {
  Sample args = sampling(i, 1);
  args.known = true;
  // The full head's graph has made the scores of all rows, choose_full() those of this one.
  if (options_.mode == HeadMode::kFull) args.upper += i * score_stride(state_.shape.vocab_size);
  INFEMERAL_CUDA(cuda::choose_full(stage(), args));
  return absl::OkStatus();
}

absl::Status ClientStages::de_embed_int8(int n) const {
  INFEMERAL_CUDA(int8_head(stage(), {.states = state_.buffers.states.data(),
                                     .n = n,
                                     .hidden_size = state_.shape.hidden_size,
                                     .stride = state_.shape.stride,
                                     .vocab_size = state_.shape.vocab_size,
                                     .copy = state_.weights.copy.data(),
                                     .bounds = state_.weights.bounds.data(),
                                     .largest_norm = state_.weights.largest_norm.data(),
                                     .planes = state_.buffers.planes.data(),
                                     .seen = state_.buffers.seen.data(),
                                     .seen_words = state_.shape.seen_words,
                                     .rows = state_.buffers.rows.data(),
                                     .lower = state_.buffers.lower.data(),
                                     .upper = state_.buffers.upper.data(),
                                     .approximate = options_.mode == HeadMode::kInt8}));
  return absl::OkStatus();
}

absl::Status ClientStages::de_embed_full(int first, int n) const {
  INFEMERAL_CUDA(full_head(stage(), full_product(first, n)));
  return absl::OkStatus();
}

FullHead ClientStages::full_product(int first, int n) const {
  return {.lm_head = state_.weights.lm_head.data(),
          .vocab_size = state_.shape.vocab_size,
          .stride = state_.shape.stride,
          .states =
              state_.buffers.states.data() + static_cast<std::size_t>(first) * state_.shape.stride,
          .n = n,
          .logits = state_.buffers.upper.data(),
          .started = &state_.buffers.rows.data()->times.de_embed};
}

// For rows [first, first + n), whose scores lie at the beginning of `upper`.
Sample ClientStages::sampling(int first, int n) const {
  return {.n = n,
          .vocab_size = state_.shape.vocab_size,
          .stride = state_.shape.stride,
          .rows = state_.buffers.rows.data() + first,
          .lower = state_.buffers.lower.data(),
          .upper = state_.buffers.upper.data(),
          .lm_head = state_.weights.lm_head.data(),
          .states = state_.buffers.states.data(),
          .seen = state_.buffers.seen.data() +
                  static_cast<std::size_t>(first) * state_.shape.seen_words,
          .seen_words = state_.shape.seen_words,
          .candidates = state_.buffers.candidates.data(),
          .results = state_.mailbox.results() + first,
          .tokens = state_.buffers.tokens.data() + first};
}

}  // namespace infemeral::cuda
