// What crosses the bus between host and device: pinned memory that the host writes, and kernels
// read and write, without a copy or a call into the driver in between.
//
// A call begins with a new sequence number, which the host writes beside what it asks. A kernel
// writes an answer first and its sequence number behind it; so the host, which watches that word,
// finds the whole answer there. What was asked must stay as it is until the answer has come, and
// one call is under way at a time, but for the next row: the kernels go on to make it when the
// token's answer is there already, and it has a word of its own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "absl/status/statusor.h"
#include "engine/sampling.h"
#include "engine/wire.h"
#include "kernels/client_shape.h"
#include "kernels/device.h"
#include "kernels/head_types.h"

namespace infemeral::cuda {

// A request as the device reads it.
RowRequest row_request(const SampleRequest& request, int vocab_size, std::uint32_t sequence);
// Sets the bits of the tokens in `history`, and clears all others. Ids beyond the vocabulary count
// for nothing.
void mark_seen(std::span<const std::int32_t> history, int vocab_size, std::uint32_t* bits);

// Where cloaked rows go, and the word that then receives *sequence.
struct Outgoing {
  std::byte* wire = nullptr;
  std::uint32_t* done = nullptr;
  const std::uint32_t* sequence = nullptr;
};

class Mailbox {
 public:
  Mailbox() = default;
  // `stream`: the one that the kernels run on. ResourceExhausted when memory cannot be pinned.
  static absl::StatusOr<Mailbox> make(const ClientShape& shape, cudaStream_t stream,
                                      DeviceUsage& usage);

  // --- the host asks ---

  // A new number for what is written from now on; never 0, which no answer has.
  void begin_call();
  std::uint32_t sequence() const { return sequence_; }
  // Ids to embed, kEmbedRows at most.
  void write_ids(std::span<const std::int32_t> ids);
  // Returned rows in the wire format, kMaxRows at most.
  void write_rows(std::span<const std::byte> rows);
  // What is asked about row i. Its history is written where a repetition penalty reads it.
  const RowRequest& write_request(int i, const SampleRequest& request);
  // The same request once more.
  void ask_again(int i);

  // --- the host waits for the answer, and reads it ---

  // Internal, or the device's error, when the stream ends without it.
  absl::Status wait_for_rows() const;  // of write_ids
  absl::Status wait_for_result(int i) const;
  absl::Status wait_for_next_row(std::uint32_t sequence) const;

  const std::byte* rows() const { return wire_out_.data(); }
  // Device time from the beginning of the lookup to its end.
  double lookup_ms() const;
  const RowResult& result(int i) const { return results_[i]; }
  const RowRequest& request(int i) const { return requests_[i]; }
  const std::byte* next_row() const { return next_row_.data(); }

  // --- addresses for kernels ---

  const std::int32_t* ids() const { return ids_.data(); }
  unsigned long long* lookup_times() const { return signals_.data()->lookup; }
  Outgoing outgoing_rows() const {
    return {wire_out_.data(), &signals_.data()->embedded, &signals_.data()->sequence};
  }
  // `sequence`: on the device, that of the token whose row it is.
  Outgoing outgoing_next_row(const std::uint32_t* sequence) const {
    return {next_row_.data(), &signals_.data()->next_row, sequence};
  }
  const std::byte* returned_rows() const { return wire_in_.data(); }
  const RowRequest* requests() const { return requests_.data(); }
  const std::uint32_t* seen() const { return seen_.data(); }  // kMaxRows x seen_words
  RowResult* results() const { return results_.data(); }

 private:
  struct Signals {
    std::uint32_t sequence;  // of the embedding that is under way
    std::uint32_t embedded;  // sequence of the last one that is done
    std::uint32_t next_row;  // sequence of the token whose cloaked row is in next_row_
    unsigned long long lookup[2];
  };

  absl::Status wait_for(const std::uint32_t& word, std::uint32_t value) const;

  ClientShape shape_;
  cudaStream_t stream_ = nullptr;
  std::uint32_t sequence_ = 0;
  Array<std::int32_t> ids_;
  Array<RowRequest> requests_;
  Array<std::uint32_t> seen_;
  Array<RowResult> results_;
  Array<std::byte> wire_in_, wire_out_, next_row_;
  Array<Signals> signals_;
};

}  // namespace infemeral::cuda
