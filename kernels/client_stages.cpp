#include "kernels/client_stages.h"

#include "kernels/device.h"
#include "kernels/rotate.h"

namespace infemeral::cuda {

// --- embed, cloak ---

Embed ClientStages::lookup(const std::int32_t* ids, int n) const {
  return {.ids = ids,
          .rows = n,
          .table = state_.weights.embedding_table(),
          .vocab_size = state_.shape.vocab_size,
          .stride = state_.shape.stride,
          .split = state_.buffers.planes_of_rows()};
}

absl::Status ClientStages::embed_rows(int n, WireDtype dtype) const {
  Embed rows = lookup(state_.mailbox.ids(), n);
  rows.times = state_.mailbox.lookup_times();
  const bool many = n > kMaxRows;
  if (many) rows.out = state_.buffers.half_rows.data();
  INFEMERAL_CUDA(embed(stage(), rows));
  return many ? cloak_many(n, dtype, state_.mailbox.outgoing_rows())
              : cloak(n, dtype, state_.mailbox.outgoing_rows());
}

// x * Q for n embedded rows that lie as planes.
absl::Status ClientStages::cloak(int n, WireDtype dtype, const Outgoing& to) const {
  INFEMERAL_CUDA(rotate(stage(), {.matrix = state_.cloak.transposed.data(),
                                  .rows = state_.shape.hidden_size,
                                  .stride = state_.shape.stride,
                                  .states = state_.buffers.planes_of_rows(),
                                  .n = n,
                                  .out = state_.buffers.embedded.data()}));
  return encode(stage(), n, dtype, to);
}

// The same for rows as they are, by cuBLAS.
absl::Status ClientStages::cloak_many(int n, WireDtype dtype, const Outgoing& to) const {
  // Row-major, cuBLAS sees the transposes: (X Q)^T = Q^T X^T.
  const float one = 1, zero = 0;
  const int h = state_.shape.hidden_size, stride = state_.shape.stride;
  INFEMERAL_RETURN(cublas_status(
      cublasGemmEx(state_.cublas.get(), CUBLAS_OP_N, CUBLAS_OP_N, h, n, h, &one,
                   state_.cloak.rows.data(), CUDA_R_16F, stride, state_.buffers.half_rows.data(),
                   CUDA_R_16F, stride, &zero, state_.buffers.embedded.data(), CUDA_R_32F, stride,
                   CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
      "cublasGemmEx"));
  // A kernel of cuBLAS does not let the next one start early.
  Stage behind_cublas = stage();
  behind_cublas.overlap = false;
  return encode(behind_cublas, n, dtype, to);
}

absl::Status ClientStages::encode(const Stage& stage, int n, WireDtype dtype,
                                  const Outgoing& to) const {
  if (options_.cloak_noise > 0) {
    INFEMERAL_CUDA(add_noise(stage, {.rows = state_.buffers.embedded.data(),
                                     .n = n,
                                     .hidden_size = state_.shape.hidden_size,
                                     .stride = state_.shape.stride,
                                     .level = options_.cloak_noise,
                                     .key = options_.noise_key,
                                     .sequence = to.sequence}));
  }
  INFEMERAL_CUDA(cuda::encode(stage, {.in = state_.buffers.embedded.data(),
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
  INFEMERAL_CUDA(embed(stage(), lookup(state_.buffers.tokens.data(), 1)));
  return cloak(1, key.dtype,
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
