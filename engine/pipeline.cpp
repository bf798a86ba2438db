#include "engine/pipeline.h"

#include <algorithm>
#include <chrono>

#include "engine/text.h"

namespace infemeral {
namespace {

using Clock = std::chrono::steady_clock;

double ms_since(Clock::time_point begin) {
  return std::chrono::duration<double, std::milli>(Clock::now() - begin).count();
}

}  // namespace

Pipeline::Pipeline(ClientBackend& backend, Link& link, PipelineOptions options)
    : backend_(backend), link_(link), options_(options) {}

Pipeline::~Pipeline() {
  drop_session();
}

// Closed at the server too: a session that nobody will use must not hold its memory there.
void Pipeline::drop_session() {
  if (session_) link_.close_session(session_->id);
  session_.reset();
}

absl::StatusOr<SessionInfo> Pipeline::open(std::stop_token stop) {
  if (session_) return *session_;
  absl::StatusOr<SessionInfo> opened = link_.open_session(stop);
  if (!opened.ok()) return opened.status();
  if (opened->hidden_size != backend_.hidden_size() || opened->max_rows == 0) {
    return absl::FailedPreconditionError(cat("the body's hidden size is ", opened->hidden_size,
                                             " and the client's is ", backend_.hidden_size(),
                                             "; they were not prepared from the same model"));
  }
  session_ = *opened;
  cached_.clear();
  return *opened;
}

absl::Status Pipeline::send_rows(std::uint32_t start_pos, std::span<const std::int32_t> ids,
                                 Wanted wanted, std::stop_token stop, PhaseTimes& times) {
  rows_.resize(ids.size() * wire_row_bytes(options_.wire, backend_.hidden_size()));
  if (auto status = backend_.embed(ids, options_.wire, rows_, times); !status.ok()) return status;
  const StepRequest step{.session = session_->id,
                         .start_pos = start_pos,
                         .rows = static_cast<std::uint32_t>(ids.size()),
                         .dtype = options_.wire,
                         .tensor = rows_,
                         .wanted = wanted};
  // What the cache holds is unknown until the body has answered.
  cached_.resize(start_pos);
  if (auto status = link_.step(step, stop, reply_, times); !status.ok()) {
    drop_session();
    return status;
  }
  const std::uint32_t expected_rows = output_rows(wanted, step.rows);
  if (reply_.rows != expected_rows || reply_.kv_len != start_pos + ids.size()) {
    drop_session();
    return absl::DataLossError(cat("the body answered with ", reply_.rows, " rows at position ",
                                   reply_.kv_len, " instead of ", expected_rows, " at ",
                                   start_pos + ids.size()));
  }
  cached_.insert(cached_.end(), ids.begin(), ids.end());
  return absl::OkStatus();
}

absl::Status Pipeline::prefill(std::span<const std::int32_t> prompt, std::stop_token stop,
                               PhaseTimes& times) {
  const std::size_t chunk = std::clamp<std::size_t>(options_.prefill_rows, 1, session_->max_rows);
  for (std::size_t begin = cached_.size(); begin < prompt.size();) {
    const std::size_t rows = std::min(chunk, prompt.size() - begin);
    const Wanted wanted = begin + rows == prompt.size() ? Wanted::kLast : Wanted::kNone;
    const auto status = send_rows(static_cast<std::uint32_t>(begin), prompt.subspan(begin, rows),
                                  wanted, stop, times);
    if (!status.ok()) return status;
    begin += rows;
  }
  return absl::OkStatus();
}

absl::Status Pipeline::generate(const GenerateRequest& request, const TokenCallback& on_token,
                                std::stop_token stop, GenerateResult& result) {
  result = {};
  const auto begin = Clock::now();
  if (request.prompt.empty()) return absl::InvalidArgumentError("the prompt has no tokens");
  if (auto status = validate(request.sampling); !status.ok()) return status;
  if (auto opened = open(stop); !opened.ok()) return opened.status();

  // The server's word counts only where it is the smaller one.
  std::size_t context = session_->max_context;
  if (options_.max_context > 0) context = std::min<std::size_t>(context, options_.max_context);
  if (request.prompt.size() >= context) {
    return absl::InvalidArgumentError(cat("the prompt has ", request.prompt.size(),
                                          " tokens and the context holds ", context,
                                          "; shorten the prompt"));
  }
  // The last token chosen needs no place in the cache: it is never sent.
  const std::size_t max_tokens =
      std::min<std::size_t>(request.max_tokens, context - request.prompt.size() + 1);

  // At least the last row must be sent, since its output is what is asked for.
  const auto [cached_end, unused] = std::mismatch(cached_.begin(), cached_.end(),
                                                  request.prompt.begin(), request.prompt.end() - 1);
  cached_.erase(cached_end, cached_.end());
  result.cached_rows = static_cast<std::uint32_t>(cached_.size());

  std::vector<std::int32_t> history = request.prompt;
  auto token_begin = begin;
  while (result.tokens.size() < max_tokens) {
    if (stop.stop_requested()) return absl::CancelledError("the generation was cancelled");
    TokenTiming timing;
    if (auto status = prefill(history, stop, timing.phases); !status.ok()) return status;

    const SampleRequest sample{
        .params = request.sampling, .position = history.size(), .history = history};
    std::int32_t token = -1;
    if (auto status = backend_.next_tokens(reply_.tensor, options_.wire, {&sample, 1}, {&token, 1},
                                           timing.phases);
        !status.ok()) {
      return status;
    }
    history.push_back(token);
    result.tokens.push_back(token);
    timing.total_ms = ms_since(token_begin);
    result.timings.push_back(timing);
    result.e2el_ms = ms_since(begin);
    if (result.tokens.size() == 1) result.ttft_ms = result.e2el_ms;

    const bool go_on = !on_token || on_token(token);
    token_begin = Clock::now();  // the caller's own time belongs to no token
    if (std::find(request.end_tokens.begin(), request.end_tokens.end(), token) !=
        request.end_tokens.end()) {
      result.finish = FinishReason::kEndToken;
      return absl::OkStatus();
    }
    if (!go_on) {
      result.finish = FinishReason::kCaller;
      return absl::OkStatus();
    }
  }
  result.finish = FinishReason::kLength;
  return absl::OkStatus();
}

}  // namespace infemeral
