#include "engine/pipeline.h"

#include <algorithm>
#include <bit>
#include <utility>

#include "engine/text.h"

namespace infemeral {
namespace {

// Rows of a long prompt's first chunk and of its last ones; in between, each has twice as many as
// the one before it, up to prefill_rows.
constexpr std::size_t kFewRows = 32;
// A step with guesses is never cut into several.
static_assert(kMaxDraft < kFewRows);

double ms_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin)
      .count();
}

std::size_t shared_prefix(const std::vector<std::int32_t>& a, const std::vector<std::int32_t>& b) {
  return static_cast<std::size_t>(std::mismatch(a.begin(), a.end(), b.begin(), b.end()).first -
                                  a.begin());
}

}  // namespace

Pipeline::Pipeline(ClientBackend& backend, Link& link, PipelineOptions options)
    : backend_(backend),
      link_(link),
      options_(std::move(options)),
      slots_(std::max(1u, options_.sessions)) {}

Pipeline::~Pipeline() {
  for (Slot& slot : slots_) drop_session(slot);
}

// ---- sessions ----

// Closed at the server too: a session that nobody will use must not hold its memory there.
void Pipeline::drop_session(Slot& slot) {
  if (slot.session) link_.close_session(slot.session->id);
  slot.session.reset();
  slot.cached.clear();
  slot.kv_len = 0;
}

absl::Status Pipeline::open_session(Slot& slot, std::stop_token stop) {
  absl::StatusOr<SessionInfo> opened = link_.open_session(stop);
  if (!opened.ok()) return opened.status();
  return use_session(slot, *opened);
}

absl::Status Pipeline::use_session(Slot& slot, const SessionInfo& session) {
  if (session.hidden_size != backend_.hidden_size() || session.max_rows == 0) {
    return absl::FailedPreconditionError(cat("the body's hidden size is ", session.hidden_size,
                                             " and the client's is ", backend_.hidden_size(),
                                             "; they were not prepared from the same model"));
  }
  slot.session = session;
  slot.cached.clear();
  slot.kv_len = 0;
  return absl::OkStatus();
}

absl::Status Pipeline::adopt(const SessionInfo& session) {
  return use_session(slots_.front(), session);
}

absl::StatusOr<SessionInfo> Pipeline::open(std::stop_token stop) {
  Slot& slot = slots_.front();
  if (!slot.session) {
    if (auto status = open_session(slot, stop); !status.ok()) return status;
  }
  return *slot.session;
}

// ---- jobs ----

absl::Status Pipeline::generate(const GenerateRequest& request, const TokenCallback& on_token,
                                std::stop_token stop, GenerateResult& result) {
  GenerateJob job{.request = request, .on_token = on_token, .result = &result};
  bool given = false;
  const absl::Status status =
      generate_all([&] { return std::exchange(given, true) ? nullptr : &job; },
                   [](GenerateJob&) { return true; }, stop);
  return status.ok() ? job.status : status;
}

absl::Status Pipeline::generate_all(const NextJob& next, const JobDone& done,
                                    std::stop_token stop) {
  retry_.emplace(options_.retry);
  waiting_.clear();
  for (Slot& slot : slots_) slot.closed = false;
  bool more = true;
  while (true) {
    const auto has_job = [](const Slot& slot) { return slot.work.job != nullptr; };
    const auto is_free = [](const Slot& slot) { return slot.work.job == nullptr && !slot.closed; };
    while (std::any_of(slots_.begin(), slots_.end(), is_free)) {
      Work work;
      if (!waiting_.empty()) {
        work = std::move(waiting_.front());
        waiting_.pop_front();
      } else if (GenerateJob* job = more ? next() : nullptr; job != nullptr) {
        work = begin_work(*job);
      } else {
        more = false;
        break;
      }
      if (auto status = assign(std::move(work), done); !status.ok()) return abandon(status, stop);
    }
    if (std::none_of(slots_.begin(), slots_.end(), has_job)) return absl::OkStatus();
    if (stop.stop_requested()) {
      return abandon(absl::CancelledError("the generation was cancelled"), stop);
    }
    if (auto status = advance(done, stop); !status.ok()) return abandon(status, stop);
  }
}

Pipeline::Work Pipeline::begin_work(GenerateJob& job) const {
  *job.result = {};
  const auto now = Clock::now();
  return {.job = &job,
          .history = job.request.prompt,
          .draft_length = DraftLength(std::min(options_.max_draft, kMaxDraft)),
          .phases_before = total_,
          .begin = now,
          .token_begin = now};
}

// To the free slot whose cache shares most with it.
absl::Status Pipeline::assign(Work work, const JobDone& done) {
  Slot* best = nullptr;
  std::size_t most = 0;
  for (Slot& slot : slots_) {
    if (slot.work.job != nullptr || slot.closed) continue;
    const std::size_t shared = shared_prefix(slot.cached, work.history);
    if (best == nullptr || shared > most || (slot.session && !best->session)) best = &slot;
    most = std::max(most, shared);
  }
  Slot& slot = *best;
  slot.work = std::move(work);
  const GenerateRequest& request = slot.work.job->request;
  if (request.prompt.empty()) {
    return finish(slot, absl::InvalidArgumentError("the prompt has no tokens"), done);
  }
  if (auto status = validate(request.sampling); !status.ok()) return finish(slot, status, done);
  return slot.session ? prepare(slot, done) : absl::OkStatus();
}

// The slot has a session: what is to be sent over it.
absl::Status Pipeline::prepare(Slot& slot, const JobDone& done) {
  const GenerateRequest& request = slot.work.job->request;
  // The server's word counts only where it is the smaller one.
  std::size_t context = slot.session->max_context;
  if (options_.max_context > 0) context = std::min<std::size_t>(context, options_.max_context);
  if (request.prompt.size() > context) {
    return finish(slot,
                  absl::InvalidArgumentError(cat("the prompt has ", request.prompt.size(),
                                                 " tokens and the context holds ", context,
                                                 "; shorten the prompt")),
                  done);
  }
  // The last token chosen needs no place in the cache: it is never sent.
  slot.work.max_tokens =
      std::min<std::size_t>(request.max_tokens, context - request.prompt.size() + 1);
  if (slot.work.max_tokens == 0) return finish(slot, absl::OkStatus(), done);

  // At least the last row must be sent, since its output is what is asked for.
  slot.cached.resize(
      std::min(shared_prefix(slot.cached, slot.work.history), slot.work.history.size() - 1));
  if (slot.work.job->result->tokens.empty()) {
    slot.work.job->result->cached_rows = static_cast<std::uint32_t>(slot.cached.size());
  }
  slot.sent = slot.cached.size();
  // A prompt of several chunks begins with small ones, so that the line soon has something to
  // carry, and ends with small ones, so that the body has little left to do when the last row is
  // there. A body that cannot keep up takes those that wait together.
  const std::size_t most = most_rows(slot);
  slot.tapers = slot.work.history.size() - slot.sent > most;
  slot.next_rows = slot.tapers ? std::min(kFewRows, most) : most;
  return absl::OkStatus();
}

std::size_t Pipeline::most_rows(const Slot& slot) const {
  return std::clamp<std::size_t>(options_.prefill_rows, 1, slot.session->max_rows);
}

absl::Status Pipeline::finish(Slot& slot, absl::Status status, const JobDone& done) {
  GenerateJob& job = *std::exchange(slot.work.job, nullptr);
  slot.work.ready = false;
  job.status = status;
  if (done(job)) return absl::OkStatus();
  return status.ok() ? absl::CancelledError("the caller wants no more") : status;
}

// Everything ends. A session with steps on their way is closed: what its cache holds is unknown.
absl::Status Pipeline::abandon(absl::Status status, std::stop_token stop) {
  for (Slot& slot : slots_) {
    if (slot.out > 0) slot.broken = status;
  }
  drain(stop);
  for (const Work& work : waiting_) work.job->status = status;
  for (Slot& slot : slots_) {
    if (slot.work.job != nullptr) slot.work.job->status = status;
    slot.work.job = nullptr;
    slot.work.ready = false;
    if (!std::exchange(slot.broken, absl::OkStatus()).ok()) drop_session(slot);
  }
  return status;
}

// ---- one thing after the other ----

absl::Status Pipeline::advance(const JobDone& done, std::stop_token stop) {
  for (Slot& slot : slots_) {
    if (!slot.broken.ok()) return mend(slot, done, stop);
  }
  for (Slot& slot : slots_) {
    if (slot.work.job == nullptr || slot.session) continue;
    // Nothing may be on its way while a session is opened; what breaks meanwhile comes first.
    if (!out_.empty()) {
      drain(stop);
      return absl::OkStatus();
    }
    slot.broken = open_session(slot, stop);
    return slot.broken.ok() ? prepare(slot, done) : absl::OkStatus();
  }
  // The next chunk is cloaked and sent while the last one is on the wire and the one before it in
  // the body.
  for (Slot& slot : slots_) {
    if (may_send(slot)) return send(slot, done, stop);
  }
  // Rows that are there wait for those that come soon, so that one product serves them all.
  const bool row_on_its_way = std::any_of(
      out_.begin(), out_.end(), [](const SentStep& step) { return step.wanted != Wanted::kNone; });
  if (row_on_its_way || std::none_of(slots_.begin(), slots_.end(),
                                     [](const Slot& slot) { return slot.work.ready; })) {
    take_answer(stop);
    return absl::OkStatus();
  }
  return sample(done);
}

std::size_t Pipeline::rows_to_send(const Slot& slot) const {
  const std::size_t left = slot.work.history.size() - slot.sent;
  const std::size_t rows = std::min(slot.next_rows, left);
  if (!slot.tapers || left <= kFewRows) return rows;
  return std::min(rows, std::max(kFewRows, std::bit_floor(left / 2)));
}

bool Pipeline::may_send(const Slot& slot) const {
  if (slot.work.job == nullptr || slot.work.ready || slot.sent == slot.work.history.size() ||
      out_.size() >= Link::kMaxInFlight) {
    return false;
  }
  if (slot.out == 0) return true;
  // One prompt does not keep the others from the line.
  const auto working = static_cast<std::uint32_t>(std::count_if(
      slots_.begin(), slots_.end(), [](const Slot& each) { return each.work.job != nullptr; }));
  const std::size_t bytes =
      rows_to_send(slot) * wire_row_bytes(options_.wire, backend_.hidden_size());
  return slot.out < std::max(1u, Link::kMaxInFlight / working) &&
         bytes_out_ + bytes <= options_.bytes_in_flight;
}

// Guesses behind the last token, if that is all there is to send and not the first answer's.
void Pipeline::add_draft(Slot& slot) const {
  Work& work = slot.work;
  const std::size_t made = work.job->result->tokens.size();
  // A server that came back may hold less than was made with the one before it.
  if (made == 0 || made >= work.max_tokens || slot.sent + 1 < work.history.size()) return;
  // The step brings a token of its own; the last token chosen is never sent.
  const std::size_t most = std::min({work.draft_length.next(), work.max_tokens - made - 1,
                                     most_rows(slot) - 1, slot.next_rows - 1});
  const std::vector<std::int32_t> draft = draft_tokens(work.history, most);
  work.history.insert(work.history.end(), draft.begin(), draft.end());
  work.drafted = draft.size();
}

absl::Status Pipeline::send(Slot& slot, const JobDone& done, std::stop_token stop) {
  add_draft(slot);
  const std::size_t begin = slot.sent;
  const std::size_t end = begin + rows_to_send(slot);
  const std::span<const std::int32_t> ids(slot.work.history.data() + begin, end - begin);
  rows_.resize(ids.size() * wire_row_bytes(options_.wire, backend_.hidden_size()));
  if (auto status = backend_.embed(ids, options_.wire, rows_, total_); !status.ok()) {
    return fail(slot, status, done, stop);
  }
  const Wanted wanted = end < slot.work.history.size() ? Wanted::kNone
                        : slot.work.drafted > 0        ? Wanted::kAll
                                                       : Wanted::kLast;
  const SentStep step{&slot, static_cast<std::uint32_t>(ids.size()),
                      static_cast<std::uint32_t>(end), rows_.size(), wanted};
  slot.broken = link_.submit({.session = slot.session->id,
                              .start_pos = static_cast<std::uint32_t>(begin),
                              .rows = step.rows,
                              .dtype = options_.wire,
                              .tensor = rows_,
                              .wanted = step.wanted},
                             stop, total_);
  if (!slot.broken.ok()) return absl::OkStatus();
  out_.push_back(step);
  bytes_out_ += step.bytes;
  ++slot.out;
  slot.sent = end;
  slot.next_rows = std::min(2 * slot.next_rows, most_rows(slot));
  return absl::OkStatus();
}

void Pipeline::take_answer(std::stop_token stop) {
  const SentStep step = out_.front();
  out_.pop_front();
  bytes_out_ -= step.bytes;
  Slot& slot = *step.slot;
  --slot.out;
  absl::Status status = link_.await(stop, reply_, total_);
  if (!slot.broken.ok()) return;  // it will be mended, whatever this answer is
  const std::uint32_t expected_rows = output_rows(step.wanted, step.rows);
  if (status.ok() && (reply_.rows != expected_rows || reply_.kv_len != step.end)) {
    status =
        absl::DataLossError(cat("the body answered with ", reply_.rows, " rows at position ",
                                reply_.kv_len, " instead of ", expected_rows, " at ", step.end));
  }
  slot.broken = std::move(status);
  if (!slot.broken.ok()) return;
  const auto history = slot.work.history.begin();
  slot.cached.insert(slot.cached.end(), history + static_cast<std::ptrdiff_t>(slot.cached.size()),
                     history + step.end);
  slot.kv_len = step.end;
  std::size_t held = 0;
  for (const Slot& s : slots_) held += s.kv_len;
  peak_kv_positions_ = std::max(peak_kv_positions_, held);
  if (step.wanted != Wanted::kNone) {
    slot.work.rows.swap(reply_.tensor);
    slot.work.ready = true;
  }
}

void Pipeline::drain(std::stop_token stop) {
  while (!out_.empty()) take_answer(stop);
}

absl::Status Pipeline::sample(const JobDone& done) {
  std::vector<Slot*> ready;
  std::vector<SampleRequest> requests;
  rows_.clear();
  for (Slot& slot : slots_) {
    const Work& work = slot.work;
    if (!work.ready) continue;
    ready.push_back(&slot);
    rows_.insert(rows_.end(), work.rows.begin(), work.rows.end());
    const std::span<const std::int32_t> history = work.history;
    for (std::size_t known = history.size() - work.drafted; known <= history.size(); ++known) {
      requests.push_back({.params = work.job->request.sampling,
                          .position = known,
                          .history = history.first(known)});
    }
  }
  std::vector<std::int32_t> tokens(requests.size(), -1);
  const absl::Status status = backend_.next_tokens(rows_, options_.wire, requests, tokens, total_);
  if (status.ok()) retry_.emplace(options_.retry);
  std::span<const std::int32_t> left = tokens;
  for (Slot* slot : ready) {
    slot->work.ready = false;
    const auto own = left.first(1 + slot->work.drafted);
    left = left.subspan(own.size());
    absl::Status went = status.ok() ? push_tokens(*slot, own, done) : finish(*slot, status, done);
    if (!went.ok()) return went;
  }
  return absl::OkStatus();
}

// What the model says behind the last token and behind each guess. It counts up to the first guess
// that is another token than the model's.
absl::Status Pipeline::push_tokens(Slot& slot, std::span<const std::int32_t> tokens,
                                   const JobDone& done) {
  Work& work = slot.work;
  const std::size_t drafted = std::exchange(work.drafted, 0), known = work.history.size() - drafted;
  const auto draft = work.history.begin() + static_cast<std::ptrdiff_t>(known);
  const auto accepted = static_cast<std::size_t>(
      std::mismatch(draft, work.history.end(), tokens.begin()).first - draft);
  work.history.resize(known);
  if (drafted > 0) {
    work.draft_length.record(drafted, accepted);
    work.job->result->drafted += drafted;
    work.job->result->accepted += accepted;
    // The next step cuts the body's cache to it. Shorter already where the session was lost.
    slot.cached.resize(std::min(slot.cached.size(), known + accepted));
    slot.sent = slot.cached.size();
  }
  const std::vector<std::int32_t>& ends = work.job->request.end_tokens;
  const auto end =
      std::find_first_of(tokens.begin(), tokens.begin() + accepted, ends.begin(), ends.end());
  tokens = tokens.first(static_cast<std::size_t>(end - tokens.begin()) + 1);

  TokenTiming timing{since(work.phases_before, total_), ms_since(work.token_begin)};
  const auto n = static_cast<double>(tokens.size());
  timing.total_ms /= n;
  for (const PhaseName& phase : kPhases) timing.phases.*phase.value /= n;
  for (const std::int32_t token : tokens) {
    if (auto status = push_token(slot, token, timing, done); !status.ok()) return status;
    if (work.job == nullptr) break;
  }
  return absl::OkStatus();
}

absl::Status Pipeline::push_token(Slot& slot, std::int32_t token, const TokenTiming& timing,
                                  const JobDone& done) {
  const GenerateJob& job = *slot.work.job;
  GenerateResult& result = *job.result;
  slot.work.history.push_back(token);
  result.tokens.push_back(token);
  result.timings.push_back(timing);
  result.e2el_ms = ms_since(slot.work.begin);
  if (result.tokens.size() == 1) result.ttft_ms = result.e2el_ms;

  const bool go_on = !job.on_token || job.on_token(token);
  slot.work.token_begin = Clock::now();  // the caller's own time belongs to no token
  slot.work.phases_before = total_;
  const std::vector<std::int32_t>& ends = job.request.end_tokens;
  if (std::find(ends.begin(), ends.end(), token) != ends.end()) {
    result.finish = FinishReason::kEndToken;
  } else if (!go_on) {
    result.finish = FinishReason::kCaller;
  } else if (result.tokens.size() < slot.work.max_tokens) {
    return absl::OkStatus();
  } else {
    result.finish = FinishReason::kLength;
  }
  return finish(slot, absl::OkStatus(), done);
}

// ---- what goes wrong ----

// Only this job ends.
absl::Status Pipeline::fail(Slot& slot, const absl::Status& status, const JobDone& done,
                            std::stop_token stop) {
  slot.broken = status;
  drain(stop);
  slot.broken = absl::OkStatus();
  drop_session(slot);
  return finish(slot, status, done);
}

absl::Status Pipeline::mend(Slot& slot, const JobDone& done, std::stop_token stop) {
  drain(stop);
  const absl::Status broken = std::exchange(slot.broken, absl::OkStatus());
  const bool full = absl::IsResourceExhausted(broken);
  if (is_broken_line(broken)) return reconnect(broken, stop);
  if (full && std::any_of(slots_.begin(), slots_.end(), [&slot](const Slot& other) {
        return &other != &slot && other.session.has_value();
      })) {
    // Said once, however many there are no places for.
    if (std::none_of(slots_.begin(), slots_.end(),
                     [](const Slot& other) { return other.closed; })) {
      log_to(options_.log, LogLevel::kWarning,
             cat(std::string(broken.message()), "; going on with fewer prompts at a time"));
    }
    lose_session(slot);
    slot.closed = true;
    waiting_.push_back(std::exchange(slot.work, {}));
    return absl::OkStatus();
  }
  // Others may leave a full server; or it holds a session of this client's until it notices that
  // its line is dead. What this one holds is given back first: two clients that keep what they have
  // while they ask for more would wait for each other.
  if (absl::IsNotFound(broken) || full) {
    if (full && retry_->attempts() == 0) {
      log_to(options_.log, LogLevel::kWarning, cat(std::string(broken.message()), "; waiting"));
    }
    lose_session(slot);
    return retry_->wait(broken, stop);
  }
  if (absl::IsInvalidArgument(broken) || absl::IsInternal(broken)) {
    return fail(slot, broken, done, stop);
  }
  return broken;
}

void Pipeline::lose_session(Slot& slot) {
  Work& work = slot.work;
  if (work.job != nullptr) work.job->result->replayed_rows += slot.cached.size();
  if (!work.ready) {  // guesses without an answer
    work.history.resize(work.history.size() - std::exchange(work.drafted, 0));
  }
  slot.broken = absl::OkStatus();
  drop_session(slot);
}

absl::Status Pipeline::reconnect(const absl::Status& broken, std::stop_token stop) {
  PhaseClock away;
  std::size_t held = 0;
  for (Slot& slot : slots_) {
    if (slot.work.job != nullptr) held += slot.cached.size();
    lose_session(slot);
    slot.closed = false;
  }
  absl::Status reason = broken;
  while (!reason.ok()) {
    if (!is_broken_line(reason)) return reason;
    if (auto status = retry_->wait(reason, stop); !status.ok()) return status;
    reason = link_.reconnect(stop);
    if (absl::IsUnimplemented(reason)) return broken;
    if (is_broken_line(reason) && retry_->attempts() == 1) {
      log_to(options_.log, LogLevel::kWarning,
             cat(std::string(broken.message()), "; trying to connect again"));
    }
  }
  away.lap(total_.network_ms);
  log_to(options_.log, LogLevel::kWarning,
         cat(std::string(broken.message()), "; connected again after ", retry_->elapsed().count(),
             " ms, attempt ", retry_->attempts(), "; sending ", held, " positions again"));
  return absl::OkStatus();
}

}  // namespace infemeral
