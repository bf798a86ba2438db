#include "kernels/mailbox.h"

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstring>

namespace infemeral::cuda {
namespace {

Selection selection_of(const SamplingParams& params, int vocab_size) {
  if (params.greedy()) return Selection::kGreedy;
  if (params.top_k > 0 && params.top_k < vocab_size) return Selection::kTopK;
  if (params.top_p < 1) return Selection::kNucleus;
  return params.min_p > 0 ? Selection::kMinP : Selection::kUnlimited;
}

}  // namespace

RowRequest row_request(const SampleRequest& request, int vocab_size, std::uint32_t sequence) {
  const SamplingParams& params = request.params;
  return {.inverse_temperature = params.greedy() ? 1.0f : 1.0f / params.temperature,
          .repetition_penalty = params.repetition_penalty,
          .top_p = params.top_p,
          .min_p = params.min_p,
          .top_k = params.top_k < vocab_size ? params.top_k : 0,
          .selection = selection_of(params, vocab_size),
          .seed = params.seed,
          .position = request.position,
          .sequence = sequence};
}

void mark_seen(std::span<const std::int32_t> history, int vocab_size, std::uint32_t* bits) {
  std::fill_n(bits, (vocab_size + 31) / 32, 0);
  for (std::int32_t id : history) {
    if (id >= 0 && id < vocab_size) bits[id / 32] |= 1u << (id % 32);
  }
}

absl::StatusOr<Mailbox> Mailbox::make(const ClientShape& shape, cudaStream_t stream,
                                      DeviceUsage& usage) {
  const std::size_t k = kMaxRows, wire_bytes = wire_row_bytes(WireDtype::kF32, shape.hidden());
  Mailbox box;
  box.shape_ = shape;
  box.stream_ = stream;
  const auto pinned = [&](auto& array, std::size_t size) {
    return allocate(array, Place::kPinned, size, usage);
  };
  INFEMERAL_RETURN(pinned(box.seen_, k * shape.seen_words));
  INFEMERAL_RETURN(pinned(box.requests_, k));
  INFEMERAL_RETURN(pinned(box.results_, k));
  INFEMERAL_RETURN(pinned(box.wire_in_, k * wire_bytes));
  INFEMERAL_RETURN(pinned(box.wire_out_, kEmbedRows * wire_bytes));
  INFEMERAL_RETURN(pinned(box.next_row_, wire_bytes));
  INFEMERAL_RETURN(pinned(box.ids_, kEmbedRows));
  INFEMERAL_RETURN(pinned(box.signals_, 1));
  return box;
}

void Mailbox::begin_call() {
  if (++sequence_ == 0) ++sequence_;
}

void Mailbox::write_ids(std::span<const std::int32_t> ids) {
  std::copy(ids.begin(), ids.end(), ids_.data());
  signals_[0].sequence = sequence_;
}

void Mailbox::write_rows(std::span<const std::byte> rows) {
  std::memcpy(wire_in_.data(), rows.data(), rows.size());
}

const RowRequest& Mailbox::write_request(int i, const SampleRequest& request) {
  requests_[i] = row_request(request, shape_.vocab_size, sequence_);
  if (request.params.repetition_penalty != 1) {
    mark_seen(request.history, shape_.vocab_size,
              seen_.data() + static_cast<std::size_t>(i) * shape_.seen_words);
  }
  return requests_[i];
}

void Mailbox::ask_again(int i) {
  std::atomic_ref(results_[i].sequence).store(0);
}

absl::Status Mailbox::wait_for_rows() const {
  return wait_for(signals_[0].embedded, sequence_);
}

absl::Status Mailbox::wait_for_result(int i) const {
  return wait_for(results_[i].sequence, requests_[i].sequence);
}

absl::Status Mailbox::wait_for_next_row(std::uint32_t sequence) const {
  return wait_for(signals_[0].next_row, sequence);
}

double Mailbox::lookup_ms() const {
  const auto* lookup = signals_[0].lookup;
  return static_cast<double>(lookup[1] - lookup[0]) * 1e-6;
}

// Watches the word; asks the driver now and then, in case that nothing will come any more.
absl::Status Mailbox::wait_for(const std::uint32_t& word, std::uint32_t value) const {
  const std::atomic_ref<const std::uint32_t> flag(word);
  const auto arrived = [&] { return flag.load(std::memory_order_acquire) == value; };
  for (std::uint64_t spins = 1; !arrived(); ++spins) {
    _mm_pause();
    if (spins % 4096 != 0) continue;
    const cudaError_t state = cudaStreamQuery(stream_);
    if (state == cudaErrorNotReady) continue;
    if (state != cudaSuccess) return cuda_status(state, "the token's kernels");
    if (!arrived()) return absl::InternalError("the GPU ended without an answer");
  }
  return absl::OkStatus();
}

}  // namespace infemeral::cuda
