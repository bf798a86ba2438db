#include "net/connection.h"

#include <algorithm>
#include <new>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "net/bytes.h"

namespace infemeral {
namespace {

absl::Status too_many_requests() {
  return absl::ResourceExhaustedError(
      "an envelope brings more requests than may wait for their answers");
}

absl::Status no_memory() {
  return absl::ResourceExhaustedError("the server has no memory for this request");
}

absl::Status shutting_down() {
  return absl::UnavailableError("the server is shutting down");
}

// The beginning is enough to tell two fingerprints apart for a person.
std::string short_hex(const Fingerprint& fingerprint) {
  return absl::BytesToHexString(
      absl::string_view(reinterpret_cast<const char*>(fingerprint.data()), 4));
}

std::string short_name(const PublicKey& key) {
  return format_public_key(key).substr(0, 25);
}

absl::Status check_fits(const OpenFrame& open, const BodyInfo& body) {
  if (open.hidden_size != body.hidden_size) {
    return absl::FailedPreconditionError(absl::StrCat(
        "the client's model has hidden size ", open.hidden_size, " and the server's has ",
        body.hidden_size, "; prepare both from the same model"));
  }
  if (open.model_fingerprint != body.model_fingerprint) {
    return absl::FailedPreconditionError(absl::StrCat(
        "client and server were prepared from different models (fingerprint ",
        short_hex(open.model_fingerprint), " here, ", short_hex(body.model_fingerprint),
        " on the server); copy the body folder that belongs to this client folder to the server"));
  }
  if (open.cloak_commitment != body.cloak_commitment) {
    return absl::FailedPreconditionError(absl::StrCat(
        "client and server were prepared with different cloaks (commitment ",
        short_hex(open.cloak_commitment), " here, ", short_hex(body.cloak_commitment),
        " on the server); copy the body folder that belongs to this client folder to the server"));
  }
  return absl::OkStatus();
}

}  // namespace

Connection::Connection(std::shared_ptr<ServerState> server, EnvelopeStream& stream,
                       std::string peer)
    : server_(std::move(server)), stream_(stream), peer_(std::move(peer)) {}

void Connection::begin() {
  ++server_->connections;
  bool draining = false;
  {
    const std::lock_guard lock(server_->mutex);
    server_->open.insert(shared_from_this());
    draining = server_->draining;
  }
  if (draining) {
    fail(shutting_down());
    return;
  }
  limit_stage(Stage::kNothing, server_->options.handshake_timeout,
              "the handshake did not come in time");
  const std::lock_guard lock(mutex_);
  read_more();
}

void Connection::drain() {
  const std::lock_guard lock(mutex_);
  end(shutting_down(), false);
}

void Connection::on_read_done(bool ok) {
  Stage stage{};
  {
    const std::lock_guard lock(mutex_);
    if (!ok) {
      // The client has nothing more to say, or is gone; what it asked for is still answered.
      end(absl::OkStatus(), false);
      return;
    }
    if (ending_) return;
    stage = stage_;
  }
  absl::Status status;
  try {
    status = stage == Stage::kNothing ? on_hello() : on_records(stage);
  } catch (const std::bad_alloc&) {
    status =
        no_memory();  // for an answer, or to read the request: this stream ends, not the server
  }
  if (!status.ok()) {
    fail(status);
    return;
  }
  const std::lock_guard lock(mutex_);
  reading_ = false;
  read_more();
}

void Connection::on_write_done(bool ok) {
  const std::lock_guard lock(mutex_);
  writing_ = false;
  outgoing_.pop_front();
  if (!ok) end(absl::UnavailableError("the client went away"), true);
  write_more();
  read_more();
  finish_when_ready();
}

void Connection::on_cancel() {
  const std::lock_guard lock(mutex_);
  end(absl::CancelledError("the client cancelled the stream"), true);
}

void Connection::on_done() {
  // The server may be gone as soon as this connection is off its list, and the connection as soon
  // as this function returns.
  const std::shared_ptr<ServerState> server = server_;
  const std::shared_ptr<Connection> self = shared_from_this();
  SessionMap ended;
  {
    const std::lock_guard lock(mutex_);
    gone_ = true;
    ended.swap(sessions_);
  }
  ended.clear();  // the body outlives its sessions
  if (alarm_) server->watchdog->disarm(*alarm_);
  const std::lock_guard lock(server->mutex);
  server->open.erase(self);
  server->changed.notify_all();
}

// ---- the read side ----

absl::Status Connection::refuse(absl::Status status) {
  ++server_->refused;
  log_to(server_->options.log, LogLevel::kWarning,
         "refused " + peer_ + ": " + std::string(status.message()));
  return status;
}

absl::Status Connection::on_hello() {
  if (!incoming_.has_hello()) {
    return refuse(absl::InvalidArgumentError("the first message is no hello"));
  }
  const std::vector<CipherSuite>& ciphers = server_->options.ciphers;
  const std::optional<CipherSuite> suite =
      cipher_suite_from_number(static_cast<std::uint32_t>(incoming_.hello().cipher()));
  if (incoming_.hello().version() != kProtocolVersion || !suite ||
      std::find(ciphers.begin(), ciphers.end(), *suite) == ciphers.end()) {
    send_refusal();
    return absl::OkStatus();
  }
  v1::Envelope envelope;
  absl::StatusOr<NoiseTransport> transport =
      server_->shake_hands(*suite, incoming_.data(), *envelope.mutable_data());
  if (!transport.ok()) return refuse(transport.status());

  client_ = transport->remote_static;
  opener_ = std::make_unique<FrameOpener>(std::move(transport->receive));
  limit_stage(Stage::kHello, server_->options.first_frame_timeout,
              "no frame followed the handshake in time");
  const std::lock_guard lock(mutex_);
  sealer_ = std::make_unique<FrameSealer>(std::move(transport->send), server_->options.rekey);
  stage_ = Stage::kHello;
  outgoing_.push_back(std::move(envelope));
  write_more();
  return absl::OkStatus();
}

// Says what the server speaks, and ends the stream.
void Connection::send_refusal() {
  v1::Envelope envelope;
  envelope.mutable_refusal()->add_versions(kProtocolVersion);
  for (const CipherSuite cipher : server_->options.ciphers) {
    envelope.mutable_refusal()->add_ciphers(static_cast<v1::Cipher>(cipher));
  }
  ++server_->refused;
  const std::lock_guard lock(mutex_);
  outgoing_.push_back(std::move(envelope));
  write_more();
  end(absl::FailedPreconditionError("the server does not speak this protocol version or cipher"),
      false);
}

void Connection::on_proof() {
  ++server_->handshakes;
  log_to(server_->options.log, LogLevel::kDebug,
         "client " + short_name(client_) + "... connected from " + peer_);
  const std::lock_guard lock(mutex_);
  stage_ = Stage::kProven;
}

void Connection::limit_stage(Stage stage, std::chrono::milliseconds timeout, const char* missing) {
  Watchdog& watchdog = *server_->watchdog;
  if (alarm_) watchdog.disarm(*alarm_);
  alarm_ =
      watchdog.arm(Watchdog::Clock::now() + timeout, [weak = weak_from_this(), stage, missing] {
        const auto self = weak.lock();
        if (!self) return;
        const std::lock_guard lock(self->mutex_);
        if (self->stage_ > stage || self->ending_) return;
        ++self->server_->refused;
        self->end(absl::DeadlineExceededError(missing), true);
      });
}

absl::Status Connection::on_records(Stage stage) {
  if (incoming_.has_hello()) {
    return absl::InvalidArgumentError("a second hello on one stream");
  }
  std::vector<std::string> frames;
  const std::size_t max_frame = opened_once_ ? server_->max_frame : kMaxFrameOverhead;
  if (absl::Status status = opener_->open(bytes_of(incoming_.data()), max_frame, frames);
      !status.ok()) {
    return stage == Stage::kHello ? refuse(status) : status;
  }
  if (stage == Stage::kHello) on_proof();
  if (frames.size() > server_->options.max_pending_per_connection) return too_many_requests();
  for (const std::string& bytes : frames) {
    absl::StatusOr<Frame> frame = decode_frame(bytes_of(bytes));
    if (!frame.ok()) return frame.status();
    if (absl::Status status = on_frame(*std::move(frame)); !status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::Status Connection::on_frame(Frame frame) {
  if (const auto* close = std::get_if<CloseFrame>(&frame.kind)) {
    sessions_.erase(close->session);
    return absl::OkStatus();
  }
  auto* open = std::get_if<OpenFrame>(&frame.kind);
  auto* step = std::get_if<StepFrame>(&frame.kind);
  if (open == nullptr && step == nullptr) {
    return absl::InvalidArgumentError("a frame that only a server sends");
  }
  {
    const std::lock_guard lock(mutex_);
    // Only an envelope that holds several frames comes here with as many pending.
    if (pending_ >= server_->options.max_pending_per_connection) return too_many_requests();
    ++pending_;
  }
  if (open != nullptr) {
    if (open->pad) pad_ = true;
    absl::StatusOr<OpenedFrame> opened = open_session(*open);
    if (opened.ok()) {
      answer(frame.request, *std::move(opened), padded_bytes(WireDtype::kF32, 0));
    } else {
      ++server_->refused_sessions;
      answer(frame.request, ErrorFrame{opened.status()}, padded_bytes(WireDtype::kF32, 0));
    }
  } else if (absl::Status status = submit_step(frame.request, *step); !status.ok()) {
    ++server_->refused_steps;
    answer(frame.request, ErrorFrame{status},
           padded_bytes(step->tensor.dtype, output_rows(step->wanted, step->rows)));
  }
  return absl::OkStatus();
}

absl::StatusOr<OpenedFrame> Connection::open_session(const OpenFrame& open) try {
  const BodyInfo& info = server_->body.info();
  if (absl::Status status = check_fits(open, info); !status.ok()) return status;
  absl::StatusOr<std::unique_ptr<SessionLease>> lease = server_->admission->admit(client_);
  if (!lease.ok()) return lease.status();
  auto session = std::make_shared<ServedSession>();
  session->lease = *std::move(lease);
  absl::StatusOr<std::unique_ptr<BodySession>> made = server_->body.new_session();
  if (!made.ok()) return made.status();
  session->body = *std::move(made);

  // Not a counter: a session's number tells nothing about the others.
  std::uint64_t id = 0;
  while (id == 0 || sessions_.count(id) != 0) randombytes_buf(&id, sizeof id);
  sessions_.emplace(id, std::move(session));
  opened_once_ = true;
  return OpenedFrame{{.id = id,
                      .hidden_size = info.hidden_size,
                      .max_context = info.max_context,
                      .max_rows = server_->options.max_rows_per_step,
                      .body = info.description},
                     pad_};
} catch (const std::bad_alloc&) {
  return no_memory();
}

absl::Status Connection::submit_step(std::uint64_t request, const StepFrame& step) try {
  const auto received = Clock::now();
  const BodyInfo& info = server_->body.info();
  const auto found = sessions_.find(step.session);
  if (found == sessions_.end()) {
    return absl::NotFoundError("the server does not have this session; open a new one");
  }
  if (step.rows > server_->options.max_rows_per_step) {
    return absl::InvalidArgumentError(absl::StrCat(
        "a step of ", step.rows, " rows; the server takes ", server_->options.max_rows_per_step));
  }
  if (step.start_pos + step.rows > info.max_context) {
    return absl::InvalidArgumentError(absl::StrCat("positions up to ", step.start_pos + step.rows,
                                                   " do not fit the context of ", info.max_context,
                                                   "; shorten the prompt or the answer"));
  }
  const WireDtype dtype = step.tensor.dtype;
  absl::StatusOr<std::vector<float>> states = unpack_rows(step.tensor, step.rows, info.hidden_size);
  if (!states.ok()) return states.status();
  // Last, so that a step that is refused takes no room.
  const std::uint32_t end = step.start_pos + step.rows;
  if (absl::Status status = found->second->lease->reserve(end); !status.ok()) return status;
  StepJob job{.session = found->second,
              .start_pos = step.start_pos,
              .rows = step.rows,
              .wanted = step.wanted,
              .states = *std::move(states)};
  job.abandoned = [self = shared_from_this()] { return self->gone_.load(); };
  job.done = [self = shared_from_this(), request, dtype, received](StepJob& done) {
    self->on_step_done(request, dtype, received, done);
  };
  server_->scheduler->submit(std::move(job));
  return absl::OkStatus();
} catch (const std::bad_alloc&) {
  return no_memory();
}

// ---- answers ----

decltype(Frame::kind) Connection::result_frame(WireDtype dtype, const StepJob& job) const {
  if (!job.status.ok()) return ErrorFrame{job.status};
  if (!all_finite(job.out)) {
    return ErrorFrame{absl::InternalError(
        "the body computed a value that is not finite; is its folder damaged?")};
  }
  const std::size_t hidden_size = server_->body.info().hidden_size;
  return OutputFrame{.rows = static_cast<std::uint32_t>(job.out.size() / hidden_size),
                     .kv_len = job.kv_len,
                     .compute_ms = job.compute_ms,
                     .tensor = pack_rows(dtype, job.out, hidden_size)};
}

void Connection::on_step_done(std::uint64_t request, WireDtype dtype, Clock::time_point received,
                              const StepJob& job) try {
  decltype(Frame::kind) result = result_frame(dtype, job);
  // Counted before the answer leaves, so that who has the answer finds it in the counters.
  const double seconds = std::chrono::duration<double>(Clock::now() - received).count();
  const auto bucket =
      std::lower_bound(kStepLatencyBounds.begin(), kStepLatencyBounds.end(), seconds);
  {
    const std::lock_guard lock(server_->latency_mutex);
    ++server_->step_latency.counts[static_cast<std::size_t>(bucket - kStepLatencyBounds.begin())];
    server_->step_latency.sum_seconds += seconds;
  }
  ++server_->steps;
  if (std::holds_alternative<ErrorFrame>(result)) ++server_->failed_steps;
  if (absl::IsUnavailable(job.status)) {
    // No answer to this step alone: the client is to connect again, perhaps to a server that has
    // been started anew.
    fail(job.status);
    return;
  }
  answer(request, std::move(result), padded_bytes(dtype, output_rows(job.wanted, job.rows)));
} catch (const std::bad_alloc&) {
  fail(no_memory());  // the answer is lost, and with it the stream
}

std::size_t Connection::padded_bytes(WireDtype dtype, std::uint32_t rows_back) const {
  return padded_frame_bytes(rows_back, wire_row_bytes(dtype, server_->body.info().hidden_size),
                            server_->options.max_rows_per_step);
}

void Connection::answer(std::uint64_t request, decltype(Frame::kind) kind,
                        std::size_t padded_bytes) {
  const std::string bytes = encode_frame({request, std::move(kind)}, pad_ ? padded_bytes : 0);
  const v1::Envelope* next = nullptr;
  {
    const std::lock_guard lock(mutex_);
    --pending_;
    if (!gone_) {
      // Encrypted in the order of writing: the nonces follow it.
      for (std::span<const std::byte> rest = bytes_of(bytes); !rest.empty();) {
        v1::Envelope envelope;
        if (absl::Status status = sealer_->seal(rest, *envelope.mutable_data()); !status.ok()) {
          end(status, true);
          break;
        }
        outgoing_.push_back(std::move(envelope));
      }
      next = next_to_write();
      read_more();
    }
    finish_when_ready();
  }
  // Not with the mutex held: the thread that learns of the write's end would have to wait for it.
  if (next != nullptr) stream_.start_write(*next);
}

void Connection::fail(absl::Status status) {
  const std::lock_guard lock(mutex_);
  end(std::move(status), true);
}

// ---- the stream; mutex_ is held ----

void Connection::read_more() {
  // Stops reading while the client does not take its answers, or asks faster than the body works.
  const std::size_t unanswered = pending_ + outgoing_.size();
  if (reading_ || ending_ || unanswered >= server_->options.max_pending_per_connection) return;
  reading_ = true;
  incoming_.Clear();
  stream_.start_read(incoming_);
}

const v1::Envelope* Connection::next_to_write() {
  if (writing_ || finished_ || outgoing_.empty()) return nullptr;
  writing_ = true;
  return &outgoing_.front();
}

void Connection::write_more() {
  if (const v1::Envelope* next = next_to_write()) stream_.start_write(*next);
}

void Connection::end(absl::Status status, bool at_once) {
  if (!ending_) ending_ = std::move(status);
  if (at_once) {
    gone_ = true;
    // Except for the envelope that is being written.
    outgoing_.resize(writing_ ? 1 : 0);
  }
  finish_when_ready();
}

void Connection::finish_when_ready() {
  if (finished_ || !ending_ || writing_) return;
  if (!gone_ && (pending_ > 0 || !outgoing_.empty())) return;
  finished_ = true;
  gone_ = true;
  stream_.finish(*ending_);
}

}  // namespace infemeral
