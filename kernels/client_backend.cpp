#include "kernels/client_backend.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "engine/cloak_noise.h"
#include "engine/text.h"
#include "kernels/client_stages.h"
#include "kernels/client_state.h"
#include "kernels/device.h"
#include "kernels/graph_cache.h"
#include "kernels/mailbox.h"

namespace infemeral {
namespace {

using namespace cuda;

class CudaClientBackend final : public ClientBackend {
 public:
  CudaClientBackend(std::unique_ptr<ClientState> state, const CudaOptions& options,
                    CudaMemory memory)
      : mode_(options.head),
        state_(std::move(state)),
        stage_(state_->device.stage),
        mailbox_(state_->mailbox),
        stages_(*state_, {mode_, options.cloak_noise, random_noise_key()}),
        name_(cat("cuda (", state_->device.name,
                  memory == CudaMemory::kSplit ? ", split memory)" : ")")) {}

  ~CudaClientBackend() override { state_->drain(); }  // before the graphs go

  std::string_view name() const override { return name_; }
  std::size_t hidden_size() const override { return state_->shape.hidden(); }
  std::size_t vocab_size() const override { return state_->shape.vocab(); }

  MemoryUse memory() const override {
    MemoryUse use;
    const ClientWeights& weights = state_->weights;
    use.head_copy_bytes = weights.copy.bytes() + weights.bounds.bytes();
    use.weights_bytes = weights.bytes();
    if (state_->subset) {
      use.head_copy_bytes += state_->subset->bytes();
      use.weights_bytes += state_->subset->bytes();
    }
    use.cloak_bytes = state_->cloak.bytes();
    use.device_peak_bytes = state_->usage.peak;
    return use;
  }

  HeadCounters head_counters() const override { return counters_; }

  // Made-up prompts and a token: the kernels that CUDA loads on first use must not be in the first
  // token's time.
  absl::Status warm_up() {
    const std::size_t row_bytes = wire_row_bytes(WireDtype::kF16, hidden_size());
    std::vector<std::byte> rows;
    PhaseTimes times;
    // Full groups of kMaxRows rows, and one row left over. What is left over from 5 to 16 rows has
    // rotations of its own, which the first such prompt still loads.
    for (const std::size_t n : {kMaxRows + 1, 2 * kMaxRows, 4 * kMaxRows, kEmbedRows}) {
      const std::vector<std::int32_t> ids(n, 0);
      rows.resize(ids.size() * row_bytes);
      INFEMERAL_RETURN(embed(ids, WireDtype::kF16, rows, times));
    }
    const std::vector<float> ones(hidden_size(), 1.0f);
    encode_wire_row(WireDtype::kF16, ones, rows.data());
    const SampleRequest greedy;
    std::int32_t token = 0;
    INFEMERAL_RETURN(next_tokens(std::span(rows).first(row_bytes), WireDtype::kF16, {&greedy, 1},
                                 {&token, 1}, times));
    counters_ = {};
    return absl::OkStatus();
  }

  absl::Status embed(std::span<const std::int32_t> ids, WireDtype dtype, std::span<std::byte> out,
                     PhaseTimes& times) override {
    return guard([&] { return embed_rows(ids, dtype, out, times); });
  }

  absl::Status next_tokens(std::span<const std::byte> rows, WireDtype dtype,
                           std::span<const SampleRequest> requests, std::span<std::int32_t> tokens,
                           PhaseTimes& times) override {
    return guard([&] { return head_and_sample(rows, dtype, requests, tokens, times); });
  }

  absl::Status logits(std::span<const std::byte> row, WireDtype dtype,
                      std::span<float> logits) override {
    return guard([&] { return mode_logits(row, dtype, logits); });
  }

 private:
  // An error of the device is final: what lies on it is not to be trusted any more.
  template <typename Body>
  absl::Status guard(const Body& body) {
    if (!broken_.ok()) return broken_;
    INFEMERAL_CUDA(cudaSetDevice(state_->device.index));
    absl::Status status = body();
    if (status.code() == absl::StatusCode::kInternal) broken_ = status;
    return status;
  }

  // --- embed, cloak ---

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
    PhaseClock clock;
    if (ids.size() == 1 && next_ && next_->id == ids[0] && next_->dtype == dtype) {
      // The last token's graph went on to make its row.
      clock.lap(times.embed_ms);
      INFEMERAL_RETURN(mailbox_.wait_for_next_row(next_->sequence));
      std::memcpy(out.data(), mailbox_.next_row(), row_bytes);
      clock.lap(times.cloak_ms);
      return absl::OkStatus();
    }
    for (std::size_t begin = 0; begin < ids.size(); begin += kEmbedRows) {
      const std::size_t n = std::min<std::size_t>(kEmbedRows, ids.size() - begin);
      mailbox_.begin_call();
      mailbox_.write_ids(ids.subspan(begin, n));
      const auto enqueue = [&] { return stages_.embed_rows(static_cast<int>(n), dtype); };
      INFEMERAL_RETURN(n == 1 ? embed_graphs_.launch(stage_, dtype, enqueue) : enqueue());
      INFEMERAL_RETURN(mailbox_.wait_for_rows());
      std::memcpy(out.data() + begin * row_bytes, mailbox_.rows(), n * row_bytes);
      double all_ms = 0;
      clock.lap(all_ms);
      const double lookup_ms = std::min(all_ms, mailbox_.lookup_ms());
      times.embed_ms += lookup_ms;
      times.cloak_ms += all_ms - lookup_ms;
    }
    return absl::OkStatus();
  }

  // --- decode, uncloak, de_embed, sample ---

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
    for (const SampleRequest& request : requests) INFEMERAL_RETURN(validate(request.params));
    for (std::size_t begin = 0; begin < requests.size(); begin += kMaxRows) {
      const std::size_t m = std::min<std::size_t>(kMaxRows, requests.size() - begin);
      const auto block = rows.subspan(begin * row_bytes, m * row_bytes);
      const auto asked = requests.subspan(begin, m);
      const auto chosen = tokens.subspan(begin, m);
      INFEMERAL_RETURN(mode_ == HeadMode::kSubset
                           ? choose_subset(block, dtype, asked, chosen, times)
                           : choose_tokens(block, dtype, asked, chosen, times));
    }
    return absl::OkStatus();
  }

  // All stages as one graph, for m rows.
  absl::Status choose_tokens(std::span<const std::byte> rows, WireDtype dtype,
                             std::span<const SampleRequest> requests,
                             std::span<std::int32_t> tokens, PhaseTimes& times) {
    PhaseClock clock;
    const bool certified = mode_ == HeadMode::kCertified;
    const int m = static_cast<int>(requests.size());
    HeadKey key = {.rows = m, .dtype = dtype};
    mailbox_.begin_call();
    for (int i = 0; i < m; ++i) {
      const Selection selection = mailbox_.write_request(i, requests[i]).selection;
      if (mode_ == HeadMode::kInt8) continue;  // one kernel for all selections
      key.scans |= needs_scan(selection);
      key.chooses |= selection != Selection::kGreedy;
    }
    mailbox_.write_rows(rows);
    next_.reset();
    INFEMERAL_RETURN(head_graphs_.launch(stage_, key, [&] { return stages_.next_token(key); }));
    for (int i = 0; i < m; ++i) INFEMERAL_RETURN(mailbox_.wait_for_result(i));
    add_times(times, clock);

    for (int i = 0; i < m; ++i) {
      const RowResult result = mailbox_.result(i);
      if (result.outcome == Outcome::kNotFinite) return not_finite();
      if (certified) {
        ++counters_.tokens;
        counters_.rows_rescored += result.rows_rescored;
      }
      if (result.outcome == Outcome::kToken && (!certified || in_range(requests[i].params))) {
        tokens[i] = result.token;
        if (m == 1) next_ = {result.token, dtype, mailbox_.sequence()};
        continue;
      }
      if (certified) ++counters_.full_passes;
      INFEMERAL_RETURN(choose_full(i, tokens[i], times));
    }
    return absl::OkStatus();
  }

  // From the subset's rows, where they give a confident answer: stage by stage, since the host
  // decides.
  absl::Status choose_subset(std::span<const std::byte> rows, WireDtype dtype,
                             std::span<const SampleRequest> requests,
                             std::span<std::int32_t> tokens, PhaseTimes& times) {
    PhaseClock clock;
    const int m = static_cast<int>(requests.size());
    const std::size_t row_bytes = rows.size() / requests.size();
    mailbox_.begin_call();
    for (int i = 0; i < m; ++i) {
      if (!all_finite(rows.subspan(i * row_bytes, row_bytes), dtype)) return not_finite();
      mailbox_.write_request(i, requests[i]);
    }
    mailbox_.write_rows(rows);
    next_.reset();
    INFEMERAL_RETURN(stages_.uncloak_rows(m, dtype));
    INFEMERAL_CUDA(cudaStreamSynchronize(stage_.stream));
    clock.lap(times.uncloak_ms);
    INFEMERAL_RETURN(state_->subset->de_embed(stage_, stages_.full_product(0, m)));
    INFEMERAL_CUDA(cudaStreamSynchronize(stage_.stream));
    clock.lap(times.de_embed_ms);
    for (int i = 0; i < m; ++i) {
      const std::optional<std::int32_t> token = state_->subset->sample(i, requests[i]);
      clock.lap(times.sample_ms);
      ++counters_.tokens;
      if (token) {
        ++counters_.subset_hits;
        tokens[i] = *token;
        continue;
      }
      ++counters_.full_passes;
      INFEMERAL_RETURN(choose_full(i, tokens[i], times));
      clock = {};
    }
    return absl::OkStatus();
  }

  // What the other heads leave to the full one: row i, whose state and request are on the device.
  absl::Status choose_full(int i, std::int32_t& token, PhaseTimes& times) {
    PhaseClock clock;
    if (mode_ != HeadMode::kFull) {  // whose graph has come as far as this
      mailbox_.ask_again(i);
      INFEMERAL_RETURN(stages_.choose_full(i, mailbox_.request(i)));
      INFEMERAL_RETURN(mailbox_.wait_for_result(i));
    }
    if (mailbox_.result(i).outcome == Outcome::kUncertain) {
      mailbox_.ask_again(i);
      INFEMERAL_RETURN(stages_.choose_among_all(i));
      INFEMERAL_RETURN(mailbox_.wait_for_result(i));
    }
    clock.lap(times.de_embed_ms);
    if (mailbox_.result(i).outcome == Outcome::kNotFinite) return not_finite();
    token = mailbox_.result(i).token;
    return absl::OkStatus();
  }

  // Scores stay finite, as the proof assumes (engine/certified_head.cpp).
  static bool in_range(const SamplingParams& params) {
    return (params.greedy() || params.temperature >= 1e-4f) && params.repetition_penalty >= 1e-3f;
  }

  bool all_finite(std::span<const std::byte> row, WireDtype dtype) {
    wire_values_.resize(hidden_size());
    decode_wire_row(dtype, row.data(), wire_values_);
    return std::all_of(wire_values_.begin(), wire_values_.end(),
                       [](float x) { return std::isfinite(x); });
  }

  static absl::Status not_finite() {
    return absl::DataLossError(
        "the body returned values that are not finite; its weights or its arithmetic are damaged");
  }

  // The device's own clock tells the stages apart; what is left of the wall clock's time is
  // bringing the row to the device and the token back.
  void add_times(PhaseTimes& times, PhaseClock& clock) const {
    double all_ms = 0;
    clock.lap(all_ms);
    const StageTimes& t = mailbox_.result(0).times;
    const auto ms = [](unsigned long long from, unsigned long long to) {
      return to > from ? static_cast<double>(to - from) * 1e-6 : 0.0;
    };
    const double uncloak = ms(t.uncloak, t.de_embed), de_embed = ms(t.de_embed, t.sample),
                 sample = ms(t.sample, t.end);
    times.uncloak_ms += uncloak;
    times.de_embed_ms += de_embed;
    times.sample_ms += sample;
    times.decode_ms += std::max(0.0, all_ms - uncloak - de_embed - sample);
  }

  // What ClientBackend::logits promises.
  absl::Status mode_logits(std::span<const std::byte> row, WireDtype dtype,
                           std::span<float> logits) {
    if (row.size() != wire_row_bytes(dtype, hidden_size()) || logits.size() != vocab_size()) {
      return absl::InvalidArgumentError(
          cat("logits: one row of ", wire_row_bytes(dtype, hidden_size()), " bytes gives ",
              vocab_size(), " logits, not ", row.size(), " and ", logits.size()));
    }
    if (!all_finite(row, dtype)) return not_finite();
    const cudaStream_t stream = stage_.stream;
    mailbox_.begin_call();
    mailbox_.write_request(0, {});
    mailbox_.write_rows(row);
    next_.reset();
    INFEMERAL_RETURN(stages_.uncloak_rows(1, dtype));
    bool covered = false;
    if (mode_ == HeadMode::kInt8) {
      INFEMERAL_RETURN(stages_.de_embed_int8(1));
      RowState state;
      INFEMERAL_CUDA(cudaMemcpyAsync(&state, state_->buffers.rows.data(), sizeof state,
                                     cudaMemcpyDeviceToHost, stream));
      INFEMERAL_CUDA(cudaStreamSynchronize(stream));
      covered = state.covered != 0;
    }
    if (!covered) INFEMERAL_RETURN(stages_.de_embed_full(0, 1));
    if (state_->subset) {
      INFEMERAL_RETURN(state_->subset->de_embed(stage_, stages_.full_product(0, 1)));
    }
    INFEMERAL_CUDA(cudaMemcpyAsync(logits.data(), state_->buffers.upper.data(), logits.size_bytes(),
                                   cudaMemcpyDeviceToHost, stream));
    INFEMERAL_CUDA(cudaStreamSynchronize(stream));
    if (state_->subset) state_->subset->restrict_logits(logits);
    return absl::OkStatus();
  }

  // The token whose cloaked row its own graph goes on to make.
  struct NextRow {
    std::int32_t id;
    WireDtype dtype;
    std::uint32_t sequence;
  };

  const HeadMode mode_;
  const std::unique_ptr<ClientState> state_;
  const Stage& stage_;
  Mailbox& mailbox_;
  const ClientStages stages_;
  const std::string name_;
  GraphCache<WireDtype> embed_graphs_;  // of one row
  GraphCache<HeadKey> head_graphs_;
  absl::Status broken_;
  std::optional<NextRow> next_;
  std::vector<float> wire_values_;  // H
  HeadCounters counters_;
};

absl::StatusOr<std::unique_ptr<ClientBackend>> make(const ClientFolder& folder,
                                                    const CudaOptions& options, CudaMemory memory) {
  auto state = ClientState::load(folder, options.head, memory);
  if (!state.ok()) return state.status();
  auto backend = std::make_unique<CudaClientBackend>(*std::move(state), options, memory);
  INFEMERAL_RETURN(backend->warm_up());
  return backend;
}

}  // namespace

absl::StatusOr<std::unique_ptr<ClientBackend>> make_cuda_client_backend(ClientFolder folder,
                                                                        const CudaOptions& options,
                                                                        const LogSink& log) {
  if (folder.manifest.cloak_mode == CloakMode::kFolded) {
    return absl::UnavailableError(
        "this client folder has folded tables (engine_prep --fold-cloak), which the CUDA backend "
        "does not read");
  }
  const CudaMemory first =
      options.memory == CudaMemory::kSplit ? CudaMemory::kSplit : CudaMemory::kFull;
  auto backend = make(folder, options, first);
  if (backend.ok() || options.memory != CudaMemory::kAuto ||
      backend.status().code() != absl::StatusCode::kResourceExhausted) {
    return backend;
  }
  log_to(log, LogLevel::kWarning,
         cat("the GPU cannot hold all weights (", std::string(backend.status().message()),
             "); float16 rows stay in host memory"));
  return make(folder, options, CudaMemory::kSplit);
}

}  // namespace infemeral
