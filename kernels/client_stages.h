// The client's mathematics as kernels on a stream: the stages of cpu/client_backend.cpp, its
// readable specification, under their names and in their order.
//
// A function here puts kernels on the stream of its stage and returns; it waits for nothing, copies
// nothing and allocates nothing, so that a graph can be recorded of it. What was asked lies in the
// mailbox before, and the answers come there.
#pragma once

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "engine/certified_head.h"
#include "engine/wire.h"
#include "kernels/client_state.h"
#include "kernels/full_head.h"
#include "kernels/int8_head.h"
#include "kernels/mailbox.h"
#include "kernels/sample.h"
#include "kernels/wire.h"

namespace infemeral::cuda {

// What a graph of next_token() is recorded for.
struct HeadKey {
  int rows = 1;
  WireDtype dtype = WireDtype::kF16;
  bool scans = false;    // a row asks for top-k
  bool chooses = false;  // a row is not greedy
  auto operator<=>(const HeadKey&) const = default;
};

struct StageOptions {
  HeadMode mode = HeadMode::kCertified;
  float cloak_noise = 0;  // engine/cloak_noise.h; 0: off
  std::uint64_t noise_key = 0;
};

class ClientStages {
 public:
  // The state must outlive the stages.
  ClientStages(const ClientState& state, const StageOptions& options)
      : state_(state), options_(options) {}

  // The mailbox's first n ids to its outgoing rows: embed, cloak. n up to kEmbedRows.
  absl::Status embed_rows(int n, WireDtype dtype) const;

  // The mailbox's returned rows to its results: decode, uncloak, de_embed, sample. Then, for one
  // row, embed and cloak of the token that it gave, to the mailbox's next row. Not for the subset
  // head, which chooses on the host.
  absl::Status next_token(const HeadKey& key) const;

  // Its parts, for heads that need something in between.
  absl::Status uncloak_rows(int n, WireDtype dtype) const;  // decode, uncloak
  absl::Status de_embed_int8(int n) const;
  // Logits of n states from `first` on, as the full head gives them; at the beginning of
  // buffers.upper.
  absl::Status de_embed_full(int first, int n) const;
  FullHead full_product(int first, int n) const;
  // The full head's token for row i: de_embed, sample. It can be uncertain.
  absl::Status choose_full(int i, const RowRequest& request) const;
  // From the scores that this or the full head's next_token() has left: always certain, and longer.
  absl::Status choose_among_all(int i) const;

 private:
  const Stage& stage() const { return state_.device.stage; }
  std::size_t row_offset(int row) const {
    return static_cast<std::size_t>(row) * static_cast<std::size_t>(state_.shape.stride);
  }
  Embed lookup(const std::int32_t* ids, int first, int n) const;
  absl::Status embed_and_cloak(const Embed& rows, int first) const;
  absl::Status encode(int n, WireDtype dtype, const Outgoing& to) const;
  absl::Status decode(int n, WireDtype dtype) const;
  absl::Status uncloak(int n, WireDtype dtype) const;
  absl::Status refine(const Rotate& product) const;
  absl::Status de_embed_and_sample(const HeadKey& key) const;
  absl::Status sample(const Sample& args, bool scans, bool chooses) const;
  Sample sampling(int first, int n) const;

  const ClientState& state_;
  const StageOptions options_;
};

}  // namespace infemeral::cuda
