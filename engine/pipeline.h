// The path of a token: ids -> cloaked rows (backend) -> body (link) -> returned row -> next id
// (backend). The pipeline owns the order of these calls and their timing, nothing else.
#pragma once

#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <optional>
#include <stop_token>
#include <vector>

#include "absl/status/status.h"
#include "engine/backend.h"
#include "engine/draft.h"
#include "engine/link.h"
#include "engine/log.h"
#include "engine/metrics.h"
#include "engine/retry.h"
#include "engine/sampling.h"

namespace infemeral {

// What a step can guess ahead.
inline constexpr std::uint32_t kMaxDraft = 31;

struct PipelineOptions {
  WireDtype wire = WireDtype::kF16;
  std::uint32_t sessions = 1;        // prompts that are generated at the same time, at most
  std::uint32_t prefill_rows = 256;  // rows of a prompt that one step carries, at most
  // Of long prompts, on their way to the body or waiting there. A line is full with its rate times
  // its round trip: 6 MB at 1 Gbit/s and 50 ms. 0: each step waits for the one before it.
  std::size_t bytes_in_flight = 16 << 20;
  std::size_t max_context = 0;  // the model's own; 0: what the server says
  // Tokens that a step guesses ahead, at most, cut to kMaxDraft (engine/draft.h); 0: none. Guesses
  // that are the model's own tokens need no step of theirs; the others cost their rows.
  std::uint32_t max_draft = 0;
  RetryOptions retry;  // of a connection that breaks
  LogSink log;         // a line for every break
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
  // One per token; the first holds the whole prefill. Where several prompts share the link, a
  // token's phases hold what was done for the others while it waited. Tokens of one step have equal
  // shares of its time.
  std::vector<TokenTiming> timings;
  FinishReason finish = FinishReason::kLength;
  std::uint32_t cached_rows = 0;  // prompt rows that the session still held and that were not sent
  std::uint64_t replayed_rows = 0;  // sent again because the session that held them was lost
  std::uint64_t drafted = 0;        // tokens that were guessed
  std::uint64_t accepted = 0;       // of these, the model's own
  double ttft_ms = 0;               // request to first token
  double e2el_ms = 0;               // request to last token
};

// Called with every token as soon as it is known; false ends the generation.
using TokenCallback = std::function<bool(std::int32_t token)>;

// One prompt of several.
struct GenerateJob {
  GenerateRequest request;
  TokenCallback on_token;
  GenerateResult* result = nullptr;  // filled as it goes; not owned
  absl::Status status;               // why it ended early
};

// Borrows the backend and the link, which must outlive it. One caller at a time. Keeps its sessions
// open on the link and reuses the part of a KV cache that a new prompt shares with an earlier one.
//
// When the line breaks or the server goes away, forgets a session or is full, the pipeline connects
// or asks again, up to RetryOptions' limits, and sends the whole history anew; the tokens are those
// of a run without a break. They do not depend on what is generated at the same time, nor on
// guesses: every token is sampled from the model's own row, at its own position.
class Pipeline {
 public:
  Pipeline(ClientBackend& backend, Link& link, PipelineOptions options);
  ~Pipeline();
  Pipeline(const Pipeline&) = delete;
  Pipeline& operator=(const Pipeline&) = delete;

  // Opens the first session if it is not open; generate() does it too. For an early connection and
  // --check.
  absl::StatusOr<SessionInfo> open(std::stop_token stop = {});

  // Uses a session that is open on the link already, and belongs to the pipeline from now on, as
  // its first one. Before anything else. FailedPrecondition when it does not fit the backend.
  absl::Status adopt(const SessionInfo& session);

  // On an error, `result` holds the tokens that were made before it. InvalidArgument when the
  // prompt is empty or longer than the context; Cancelled when `stop` was triggered; else
  // the errors of ClientBackend and Link, those of a broken line or a full server when
  // RetryOptions' limits are reached.
  absl::Status generate(const GenerateRequest& request, const TokenCallback& on_token,
                        std::stop_token stop, GenerateResult& result);

  // The next job, or null when there is none; asked whenever a session is free.
  using NextJob = std::function<GenerateJob*()>;
  // A job that ended, well or badly; the pipeline does not look at it again. False ends
  // generate_all() with the job's status, or Cancelled when that is OK.
  using JobDone = std::function<bool(GenerateJob& job)>;
  // Generates up to `sessions` jobs at the same time, fewer where the server gives fewer sessions;
  // they end in any order. OK when all jobs have ended, each with its own status: the backend's
  // errors and those that a Link has for one request. Any other error ends them all, is returned,
  // and is the status of the jobs that ran, for which `done` is not called.
  absl::Status generate_all(const NextJob& next, const JobDone& done, std::stop_token stop);

  // The most positions that the KV caches of all its sessions together have held.
  std::size_t peak_kv_positions() const { return peak_kv_positions_; }

 private:
  using Clock = std::chrono::steady_clock;

  // A job and how far it is.
  struct Work {
    GenerateJob* job = nullptr;
    std::vector<std::int32_t> history;  // the prompt, the tokens so far, and guesses behind them
    std::size_t drafted = 0;            // of these, guesses: their step is on its way, or ready
    DraftLength draft_length;
    std::size_t max_tokens = 0;
    bool ready = false;  // `rows` are the output for the last token and for each guess
    std::vector<std::byte> rows;
    PhaseTimes phases_before;  // total_ when the current token began
    Clock::time_point begin, token_begin;
  };
  // A session and the job that uses it.
  struct Slot {
    std::optional<SessionInfo> session;
    std::vector<std::int32_t> cached;  // ids whose rows the session's KV cache holds
    std::size_t sent = 0;              // positions that are cached or on their way
    std::size_t kv_len = 0;            // positions that the body holds, as it last said
    std::size_t next_rows = 0;         // of the next step, at most
    bool tapers = false;               // a prompt of several steps: the last ones are small
    std::uint32_t out = 0;             // steps on their way
    absl::Status broken;               // why the session cannot go on; to be mended
    bool closed = false;               // the server has no session for it
    Work work;
  };
  // A step on its way.
  struct SentStep {
    Slot* slot = nullptr;
    std::uint32_t rows = 0;
    std::uint32_t end = 0;  // position behind its last row
    std::size_t bytes = 0;
    Wanted wanted = Wanted::kNone;
  };

  Work begin_work(GenerateJob& job) const;
  // Errors of these end all jobs.
  absl::Status assign(Work work, const JobDone& done);
  absl::Status prepare(Slot& slot, const JobDone& done);
  absl::Status advance(const JobDone& done, std::stop_token stop);
  absl::Status send(Slot& slot, const JobDone& done, std::stop_token stop);
  absl::Status sample(const JobDone& done);
  absl::Status push_tokens(Slot& slot, std::span<const std::int32_t> tokens, const JobDone& done);
  absl::Status push_token(Slot& slot, std::int32_t token, const TokenTiming& timing,
                          const JobDone& done);
  absl::Status mend(Slot& slot, const JobDone& done, std::stop_token stop);
  absl::Status reconnect(const absl::Status& broken, std::stop_token stop);
  absl::Status fail(Slot& slot, const absl::Status& status, const JobDone& done,
                    std::stop_token stop);
  absl::Status finish(Slot& slot, absl::Status status, const JobDone& done);
  absl::Status abandon(absl::Status status, std::stop_token stop);

  absl::Status open_session(Slot& slot, std::stop_token stop);
  absl::Status use_session(Slot& slot, const SessionInfo& session);
  void drop_session(Slot& slot);
  void lose_session(Slot& slot);  // it will be opened anew, and what it held sent again
  void take_answer(std::stop_token stop);
  void drain(std::stop_token stop);
  std::size_t most_rows(const Slot& slot) const;  // that one step may carry
  std::size_t rows_to_send(const Slot& slot) const;
  void add_draft(Slot& slot) const;
  bool may_send(const Slot& slot) const;

  ClientBackend& backend_;
  Link& link_;
  const PipelineOptions options_;
  std::vector<Slot> slots_;
  std::size_t peak_kv_positions_ = 0;
  std::deque<SentStep> out_;     // oldest first
  std::size_t bytes_out_ = 0;    // of these
  std::optional<Retry> retry_;   // since the last token
  std::deque<Work> waiting_;     // without a slot
  PhaseTimes total_;             // of everything so far
  std::vector<std::byte> rows_;  // wire rows on their way out, or back; reused
  StepReply reply_;              // reused
};

}  // namespace infemeral
