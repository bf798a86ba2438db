// The path of a token: ids -> cloaked rows (backend) -> body (link) -> returned row -> next id
// (backend). The pipeline owns the order of these calls and their timing, nothing else.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <stop_token>
#include <vector>

#include "absl/status/status.h"
#include "engine/backend.h"
#include "engine/link.h"
#include "engine/metrics.h"
#include "engine/sampling.h"

namespace infemeral {

struct PipelineOptions {
  WireDtype wire = WireDtype::kF16;
  std::uint32_t prefill_rows = 256;  // rows of a prompt that one step carries, at most
  std::size_t max_context = 0;       // the model's own; 0: what the server says
};

struct GenerateRequest {
  std::vector<std::int32_t> prompt;  // at least one id
  std::uint32_t max_tokens = 128;    // cut to what the context can hold
  SamplingParams sampling;
  std::vector<std::int32_t> end_tokens;  // any of these ends the generation; it is part of `tokens`
};

enum class FinishReason {
  kEndToken,  // one of end_tokens was chosen
  kLength,    // max_tokens, or the end of the context
  kCaller     // the token callback returned false
};

struct GenerateResult {
  std::vector<std::int32_t> tokens;
  std::vector<TokenTiming> timings;  // one per token; the first holds the whole prefill
  FinishReason finish = FinishReason::kLength;
  std::uint32_t cached_rows = 0;  // prompt rows that the session still held and that were not sent
  double ttft_ms = 0;             // request to first token
  double e2el_ms = 0;             // request to last token
};

// Called with every token as soon as it is known; false ends the generation.
using TokenCallback = std::function<bool(std::int32_t token)>;

// Borrows the backend and the link, which must outlive it. One caller at a time. Keeps one session
// open on the link and reuses the part of its KV cache that a new prompt shares with the last one.
class Pipeline {
 public:
  Pipeline(ClientBackend& backend, Link& link, PipelineOptions options);
  ~Pipeline();
  Pipeline(const Pipeline&) = delete;
  Pipeline& operator=(const Pipeline&) = delete;

  // Opens the session if it is not open; generate() does it too. For an early connection and
  // --check.
  absl::StatusOr<SessionInfo> open(std::stop_token stop = {});

  // On an error, `result` holds the tokens that were made before it. InvalidArgument when the
  // prompt is empty or does not leave room for one token; Cancelled when `stop` was triggered; else
  // the errors of ClientBackend and Link.
  absl::Status generate(const GenerateRequest& request, const TokenCallback& on_token,
                        std::stop_token stop, GenerateResult& result);

 private:
  void drop_session();
  absl::Status prefill(std::span<const std::int32_t> prompt, std::stop_token stop,
                       PhaseTimes& times);
  absl::Status send_rows(std::uint32_t start_pos, std::span<const std::int32_t> ids, Wanted wanted,
                         std::stop_token stop, PhaseTimes& times);

  ClientBackend& backend_;
  Link& link_;
  const PipelineOptions options_;
  std::optional<SessionInfo> session_;
  std::vector<std::int32_t> cached_;  // ids whose rows the session's KV cache holds
  std::vector<std::byte> rows_;       // wire rows on their way out; reused
  StepReply reply_;                   // reused
};

}  // namespace infemeral
