#include "cpu/client_backend.h"

#include <sodium.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cpu/aligned.h"
#include "cpu/cloak_matrix.h"
#include "cpu/guard.h"
#include "cpu/int8_head.h"
#include "cpu/linear.h"
#include "cpu/parallel.h"
#include "cpu/simd/dispatch.h"
#include "cpu/subset_rows.h"
#include "engine/cloak_noise.h"
#include "engine/subset_head.h"
#include "engine/text.h"
#include "engine/token_subset.h"

namespace infemeral {
namespace {

// Rows that are in flight at once: enough for the products to run from cache, few enough for
// buffers to stay small. Head rows carry V floats each.
constexpr std::size_t kEmbedRows = 256;
constexpr std::size_t kHeadRows = 16;

class CpuClientBackend final : public ClientBackend {
 public:
  // subset_ids: of the subset head, and empty for any other.
  CpuClientBackend(ClientFolder folder, const simd::Kernels& kernels, const CpuOptions& options,
                   std::vector<std::int32_t> subset_ids)
      : folder_(std::move(folder)),
        embed_tokens_(table(folder_.embed_tokens)),
        lm_head_(table(folder_.lm_head)),
        kernels_(kernels),
        pool_(options.threads),
        name_(cat("cpu (", kernels.name, ")")),
        mode_(options.head),
        folded_(folder_.manifest.cloak_mode == CloakMode::kFolded),
        noise_(options.cloak_noise) {
    if (!folded_) {
      final_gain_.resize(hidden_size());
      folder_.final_norm.read(0, final_gain_);
      columns_.reserve(hidden_size());
      edges_.reserve(hidden_size());  // of one row: a decode step allocates nothing
    }
    if (mode_ == HeadMode::kCertified || mode_ == HeadMode::kInt8) {
      int8_.emplace(lm_head_, kernels_, pool_, options.progress);
    }
    if (mode_ == HeadMode::kSubset) {
      subset_rows_.emplace(lm_head_, subset_ids);
      subset_.emplace(std::move(subset_ids), vocab_size());
    }
  }

  // Copies of folded rows are as secret as the cloak.
  ~CpuClientBackend() override {
    if (!folded_) return;
    if (int8_) int8_->wipe();
    if (subset_rows_) subset_rows_->wipe();
    sodium_memzero(plain_.data(), plain_.size() * sizeof(float));
    sodium_memzero(cloaked_.data(), cloaked_.size() * sizeof(float));
  }

  std::string_view name() const override { return name_; }
  std::size_t hidden_size() const override { return embed_tokens_.cols; }
  std::size_t vocab_size() const override { return embed_tokens_.rows; }

  MemoryUse memory() const override {
    MemoryUse use;
    use.weights_bytes = folder_.embed_tokens.data.size() + folder_.final_norm.data.size();
    if (lm_head_.data != embed_tokens_.data) use.weights_bytes += folder_.lm_head.data.size();
    if (int8_) use.head_copy_bytes = int8_->bytes();
    if (subset_rows_) use.head_copy_bytes = subset_rows_->bytes();
    use.weights_bytes += use.head_copy_bytes;
    if (cloak_) use.cloak_bytes = cloak_->bytes();
    return use;
  }

  HeadCounters head_counters() const override { return counters_; }

  absl::Status embed(std::span<const std::int32_t> ids, WireDtype dtype, std::span<std::byte> out,
                     PhaseTimes& times) override {
    return guarded([&] { return embed_rows(ids, dtype, out, times); });
  }

  absl::Status next_tokens(std::span<const std::byte> rows, WireDtype dtype,
                           std::span<const SampleRequest> requests, std::span<std::int32_t> tokens,
                           PhaseTimes& times) override {
    return guarded([&] { return head_and_sample(rows, dtype, requests, tokens, times); });
  }

  absl::Status logits(std::span<const std::byte> row, WireDtype dtype,
                      std::span<float> logits) override {
    if (row.size() != wire_row_bytes(dtype, hidden_size()) || logits.size() != vocab_size()) {
      return absl::InvalidArgumentError(
          cat("logits: one row of ", wire_row_bytes(dtype, hidden_size()), " bytes gives ",
              vocab_size(), " logits, not ", row.size(), " and ", logits.size()));
    }
    PhaseTimes times;
    return guarded([&] {
      absl::Status status = uncloak(row, dtype, 1, times);
      if (status.ok()) mode_logits(logits);
      return status;
    });
  }

 private:
  // ClientFolder::open has checked that both tables are V x H and f16.
  static Matrix table(const TensorView& view) {
    return {simd::Format::kF16, view.data.data(), view.shape[0], view.shape[1]};
  }
  static void grow(AlignedFloats& buffer, std::size_t size) {
    if (buffer.size() < size) buffer.resize(size);
  }
  Rows buffer(AlignedFloats& buffer, std::size_t rows) const {
    grow(buffer, rows * hidden_size());
    return {buffer.data(), hidden_size()};
  }

  Rows vocab_rows(AlignedFloats& buffer, std::size_t rows) const {
    grow(buffer, rows * vocab_size());
    return {buffer.data(), vocab_size()};
  }
  Rows state(std::size_t i) { return Rows{plain_.data(), hidden_size()}.from(i); }

  absl::Status ensure_cloak() {
    if (cloak_) return absl::OkStatus();
    const absl::StatusOr<Cloak> cloak = folder_.load_cloak();
    if (!cloak.ok()) return cloak.status();
    cloak_.emplace(*cloak);
    return absl::OkStatus();
  }

  absl::Status embed_rows(std::span<const std::int32_t> ids, WireDtype dtype,
                          std::span<std::byte> out, PhaseTimes& times) {
    const std::size_t row_bytes = wire_row_bytes(dtype, hidden_size());
    if (out.size() != ids.size() * row_bytes) {
      return absl::InvalidArgumentError(cat("embed: the output holds ", out.size(), " bytes; ",
                                            ids.size(), " rows need ", ids.size() * row_bytes));
    }
    for (std::size_t i = 0; i < ids.size(); ++i) {
      if (ids[i] < 0 || static_cast<std::size_t>(ids[i]) >= vocab_size()) {
        return absl::InvalidArgumentError(
            cat("embed: token ", i, " is outside the vocabulary of ", vocab_size(), " tokens"));
      }
    }
    for (std::size_t begin = 0; begin < ids.size(); begin += kEmbedRows) {
      const std::size_t m = std::min(kEmbedRows, ids.size() - begin);
      PhaseClock clock;
      const Rows cloaked = buffer(cloaked_, m), plain = folded_ ? cloaked : buffer(plain_, m);
      for (std::size_t i = 0; i < m; ++i) {
        kernels_.from_f16(embedding(ids[begin + i]), hidden_size(), plain[i]);
      }
      clock.lap(times.embed_ms);

      if (!folded_) {
        if (absl::Status status = ensure_cloak(); !status.ok()) return status;
        if (dtype == WireDtype::kF32) {
          multiply_exactly(plain, m, cloaked);
        } else {
          multiply(cloak_->transposed(), plain, m, cloaked);
          if (!noise_.on()) sum_edges_exactly(dtype, ids.subspan(begin, m), plain, cloaked);
        }
      }
      for (std::size_t i = 0; i < m; ++i) {
        noise_.add({cloaked[i], hidden_size()});
        encode_wire_row(dtype, {cloaked[i], hidden_size()}, out.data() + (begin + i) * row_bytes);
      }
      clock.lap(times.cloak_ms);
    }
    return absl::OkStatus();
  }

  const std::uint16_t* embedding(std::int32_t id) const {
    return reinterpret_cast<const std::uint16_t*>(
        embed_tokens_.data + static_cast<std::size_t>(id) * embed_tokens_.row_bytes());
  }

  float exact_sum(const float* plain, std::size_t column) const {
    const std::byte* weights = cloak_->transposed().row(column).data;
    return static_cast<float>(
        kernels_.exact_dot(plain, reinterpret_cast<const std::uint16_t*>(weights), hidden_size()));
  }
  // Columns below which a second thread does not pay.
  std::size_t exact_grain() const { return (std::size_t{1} << 17) / hidden_size() + 1; }

  // cloaked = plain * Q, plain holding binary16 numbers.
  void multiply_exactly(const Rows& plain, std::size_t m, const Rows& cloaked) {
    pool_.for_ranges(hidden_size(), exact_grain() / m + 1, 1, [&](const Range& range) {
      for (std::size_t column = range.begin; column < range.end; ++column) {
        for (std::size_t i = 0; i < m; ++i) cloaked[i][column] = exact_sum(plain[i], column);
      }
    });
  }

  struct Edge {
    std::uint32_t column;
    std::uint32_t row;
    auto operator<=>(const Edge&) const = default;
  };

  // What engine/wire_edges.h promises of cloaked = plain * Q, plain being the ids' embeddings.
  void sum_edges_exactly(WireDtype dtype, std::span<const std::int32_t> ids, const Rows& plain,
                         const Rows& cloaked) {
    if (dtype == WireDtype::kI8) sum_exactly(ids, plain, cloaked, append_scale_edges);
    sum_exactly(ids, plain, cloaked, [&](auto row, float error, auto& columns) {
      append_code_edges(dtype, row, error, columns);
    });
  }

  // append_edges(row, error, columns): engine/wire.h's.
  template <typename AppendEdges>
  void sum_exactly(std::span<const std::int32_t> ids, const Rows& plain, const Rows& cloaked,
                   const AppendEdges& append_edges) {
    edges_.clear();
    for (std::size_t i = 0; i < ids.size(); ++i) {
      double squares = 0;
      kernels_.row_range(embedding(ids[i]), hidden_size(), &squares);
      columns_.clear();
      append_edges(std::span<const float>(cloaked[i], hidden_size()),
                   kernels_.sum_error * static_cast<float>(std::sqrt(squares)), columns_);
      for (const std::uint32_t column : columns_) {
        edges_.push_back({column, static_cast<std::uint32_t>(i)});
      }
    }
    std::sort(edges_.begin(), edges_.end());  // a column of Q comes from memory once
    pool_.for_ranges(edges_.size(), exact_grain(), 1, [&](const Range& range) {
      for (std::size_t e = range.begin; e < range.end; ++e) {
        const auto [column, row] = edges_[e];
        cloaked[row][column] = exact_sum(plain[row], column);
      }
    });
  }

  absl::Status head_and_sample(std::span<const std::byte> rows, WireDtype dtype,
                               std::span<const SampleRequest> requests,
                               std::span<std::int32_t> tokens, PhaseTimes& times) {
    const std::size_t row_bytes = wire_row_bytes(dtype, hidden_size());
    if (rows.size() != requests.size() * row_bytes || tokens.size() != requests.size()) {
      return absl::InvalidArgumentError(cat("next_tokens: ", requests.size(), " requests need ",
                                            requests.size() * row_bytes, " bytes of rows and ",
                                            requests.size(), " tokens, not ", rows.size(), " and ",
                                            tokens.size()));
    }
    for (const SampleRequest& request : requests) {
      if (absl::Status status = validate(request.params); !status.ok()) return status;
    }
    for (std::size_t begin = 0; begin < requests.size(); begin += kHeadRows) {
      const std::size_t m = std::min(kHeadRows, requests.size() - begin);
      absl::Status status = uncloak(rows.subspan(begin * row_bytes), dtype, m, times);
      if (!status.ok()) return status;
      const auto block = requests.subspan(begin, m);
      const auto chosen = tokens.subspan(begin, m);
      switch (mode_) {
        case HeadMode::kCertified:
          choose_certified(block, chosen, times);
          break;
        case HeadMode::kSubset:
          choose_subset(block, chosen, times);
          break;
        case HeadMode::kFull:
        case HeadMode::kInt8:
          choose_from_logits(block, chosen, times);
      }
    }
    return absl::OkStatus();
  }

  // De-embed and sample for the m states that uncloak() left.
  void choose_from_logits(std::span<const SampleRequest> requests, std::span<std::int32_t> tokens,
                          PhaseTimes& times) {
    const std::size_t m = requests.size();
    const Rows logits = vocab_rows(logits_, m);
    PhaseClock clock;
    mode_ == HeadMode::kFull ? multiply(lm_head_, state(0), m, logits) : multiply_int8(m, logits);
    clock.lap(times.de_embed_ms);
    for (std::size_t i = 0; i < m; ++i) {
      tokens[i] = sampler_.sample({logits[i], vocab_size()}, requests[i]);
    }
    clock.lap(times.sample_ms);
  }

  // The same tokens as choose_from_logits with the full head gives. The threads that multiply look
  // for candidates as well, and rows are read in float16: both count as de-embedding.
  void choose_certified(std::span<const SampleRequest> requests, std::span<std::int32_t> tokens,
                        PhaseTimes& times) {
    const std::size_t m = requests.size();
    if (certified_.size() < m) certified_.resize(m);
    PhaseClock clock;
    int8_->load(state(0), m);
    for (std::size_t i = 0; i < m; ++i) {
      certified_[i].start(requests[i], vocab_size(), static_cast<std::size_t>(pool_.threads()));
    }
    int8_->intervals(
        [&](std::size_t i, std::size_t worker, std::size_t first, std::span<float> lower,
            std::span<float> upper) { certified_[i].observe(worker, first, lower, upper); });
    clock.lap(times.de_embed_ms);
    for (std::size_t i = 0; i < m; ++i) {
      std::optional<std::int32_t> token;
      if (int8_->covers(i)) {
        const auto rescore = [&](std::span<Candidate> candidates) {
          clock.lap(times.sample_ms);
          score_rows(candidates, state(i));
          clock.lap(times.de_embed_ms);
        };
        token = certified_[i].finish(rescore, counters_);
      }
      ++counters_.tokens;
      tokens[i] =
          token ? *token : choose_full(i, vocab_rows(logits_, 1), requests[i], clock, times);
      clock.lap(times.sample_ms);
    }
  }

  // From the subset's rows, where they give a confident answer.
  void choose_subset(std::span<const SampleRequest> requests, std::span<std::int32_t> tokens,
                     PhaseTimes& times) {
    const std::size_t m = requests.size(), n = subset_->ids().size();
    grow(subset_logits_, m * n);
    const Rows logits{subset_logits_.data(), n};
    PhaseClock clock;
    multiply(subset_rows_->matrix(), state(0), m, logits);
    clock.lap(times.de_embed_ms);
    for (std::size_t i = 0; i < m; ++i) {
      const std::optional<std::int32_t> token = subset_->sample({logits[i], n}, requests[i]);
      ++counters_.tokens;
      counters_.subset_hits += token.has_value();
      tokens[i] =
          token ? *token : choose_full(i, vocab_rows(logits_, 1), requests[i], clock, times);
      clock.lap(times.sample_ms);
    }
  }

  // What the other heads leave to the full one; `logits` is scratch for a row.
  std::int32_t choose_full(std::size_t i, const Rows& logits, const SampleRequest& request,
                           PhaseClock& clock, PhaseTimes& times) {
    ++counters_.full_passes;
    clock.lap(times.sample_ms);
    multiply(lm_head_, state(i), 1, logits);
    clock.lap(times.de_embed_ms);
    return sampler_.sample({logits.data, vocab_size()}, request);
  }

  // The logits that the int8 product stands for; the full head's of states too odd for it.
  void multiply_int8(std::size_t m, const Rows& logits) {
    int8_->load(state(0), m);
    int8_->approximate(logits);
    for (std::size_t i = 0; i < m; ++i) {
      if (!int8_->covers(i)) multiply(lm_head_, state(i), 1, logits.from(i));
    }
  }

  // What ClientBackend::logits promises, for the state that uncloak() left.
  void mode_logits(std::span<float> logits) {
    const Rows row{logits.data(), vocab_size()};
    if (mode_ == HeadMode::kInt8) return multiply_int8(1, row);
    multiply(lm_head_, state(0), 1, row);
    if (mode_ != HeadMode::kSubset) return;
    subset_logits_.clear();  // the same bits as choose_subset's
    for (std::int32_t id : subset_->ids()) {
      subset_logits_.push_back(logits[static_cast<std::size_t>(id)]);
    }
    if (subset_confidence(subset_logits_, {}) < kSubsetConfidence) return;
    std::fill(logits.begin(), logits.end(), -std::numeric_limits<float>::infinity());
    for (std::size_t i = 0; i < subset_logits_.size(); ++i) {
      logits[static_cast<std::size_t>(subset_->ids()[i])] = subset_logits_[i];
    }
  }

  // Single rows of the product that multiply(lm_head_, ...) takes of all: the same bits.
  void score_rows(std::span<Candidate> candidates, const Rows& x) {
    constexpr std::size_t kBatch = 64;
    pool_.for_ranges(candidates.size(), linear_grain(1, hidden_size()), 8, [&](const Range& range) {
      const void* rows[kBatch];
      float scores[kBatch];
      for (std::size_t begin = range.begin; begin < range.end; begin += kBatch) {
        const auto batch = candidates.subspan(begin, std::min(kBatch, range.end - begin));
        for (std::size_t i = 0; i < batch.size(); ++i) {
          rows[i] = lm_head_.row(static_cast<std::size_t>(batch[i].id)).data;
        }
        kernels_.matmul_picked[static_cast<std::size_t>(lm_head_.format)](
            {.a = x.data, .rows = rows, .c = scores, .n = batch.size(), .k = hidden_size()});
        for (std::size_t i = 0; i < batch.size(); ++i) batch[i].score = scores[i];
      }
    });
  }

  void multiply(const Matrix& matrix, const Rows& x, std::size_t m, const Rows& out) {
    const Linear product{.weight = &matrix, .out = out};
    linear(kernels_, pool_, {&product, 1}, x, m);
  }

  // The states that lm_head is multiplied with, gain * (y' * Q^T), for m rows in the wire format;
  // state(i) is where they lie then. A folded head takes y' itself.
  absl::Status uncloak(std::span<const std::byte> rows, WireDtype dtype, std::size_t m,
                       PhaseTimes& times) {
    PhaseClock clock;
    const Rows plain = buffer(plain_, m), cloaked = folded_ ? plain : buffer(cloaked_, m);
    for (std::size_t i = 0; i < m; ++i) {
      const std::span<float> row(cloaked[i], hidden_size());
      decode_wire_row(dtype, rows.data() + i * wire_row_bytes(dtype, hidden_size()), row);
      if (!std::all_of(row.begin(), row.end(), [](float x) { return std::isfinite(x); })) {
        return absl::DataLossError(
            "the body returned values that are not finite; its weights or its arithmetic are "
            "damaged");
      }
    }
    clock.lap(times.decode_ms);
    if (folded_) return absl::OkStatus();

    if (absl::Status status = ensure_cloak(); !status.ok()) return status;
    multiply(cloak_->rows(), cloaked, m, plain);
    if (dtype == WireDtype::kF32) refine(cloaked, plain, m);
    for (std::size_t i = 0; i < m; ++i) {
      for (std::size_t j = 0; j < hidden_size(); ++j) plain[i][j] *= final_gain_[j];
    }
    clock.lap(times.uncloak_ms);
    return absl::OkStatus();
  }

  // Q is stored in float16, so Q * Q^T = I + D with |D| up to 1e-3, and y' * Q^T is off by about
  // 3e-4 of its norm. On an f32 wire that would be the largest error left; one step of iterative
  // refinement, y += (y' - y * Q) * Q^T, leaves D^2. The f16 and i8 wires round as much
  // themselves, so there it would gain nothing.
  void refine(const Rows& cloaked, const Rows& plain, std::size_t m) {
    const Rows residual = buffer(residual_, m), correction = buffer(correction_, m);
    multiply(cloak_->transposed(), plain, m, residual);
    const std::size_t n = m * hidden_size();
    for (std::size_t i = 0; i < n; ++i) residual.data[i] = cloaked.data[i] - residual.data[i];
    multiply(cloak_->rows(), residual, m, correction);
    for (std::size_t i = 0; i < n; ++i) plain.data[i] += correction.data[i];
  }

  ClientFolder folder_;
  Matrix embed_tokens_;  // V x H, f16
  Matrix lm_head_;       // V x H
  const simd::Kernels& kernels_;
  ThreadPool pool_;
  std::string name_;
  const HeadMode mode_;
  const bool folded_;  // the tables are rotated, and the gain is in lm_head
  CloakNoise noise_;
  std::optional<Int8Head> int8_;           // of the certified and the int8 head
  std::optional<SubsetRows> subset_rows_;  // of the subset head: n x H
  std::optional<SubsetSampler> subset_;
  std::vector<float> final_gain_;     // H; empty when folded
  std::optional<CloakMatrix> cloak_;  // made on first use
  AlignedFloats plain_;               // rows x H
  AlignedFloats cloaked_;             // rows x H
  AlignedFloats residual_;            // rows x H
  AlignedFloats correction_;          // rows x H
  AlignedFloats logits_;              // rows x V
  AlignedFloats subset_logits_;       // rows x n
  std::vector<Edge> edges_;           // of one call of sum_exactly()
  std::vector<std::uint32_t> columns_;
  Sampler sampler_;
  std::vector<CertifiedSampler> certified_;  // one a row
  HeadCounters counters_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<ClientBackend>> make_cpu_client_backend(ClientFolder folder,
                                                                       const CpuOptions& options) {
  const absl::StatusOr<const simd::Kernels*> kernels = simd::choose_kernels();
  if (!kernels.ok()) return kernels.status();

  std::vector<std::int32_t> subset_ids;
  if (options.head == HeadMode::kSubset) {
    auto ids = load_token_subset(folder.manifest, folder.path);
    if (!ids.ok()) return ids.status();
    subset_ids = *std::move(ids);
  }
  return guarded_or<std::unique_ptr<ClientBackend>>([&] {
    return std::make_unique<CpuClientBackend>(std::move(folder), **kernels, options,
                                              std::move(subset_ids));
  });
}

}  // namespace infemeral
