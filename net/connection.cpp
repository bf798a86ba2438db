#include "net/connection.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "net/bytes.h"

namespace infemeral {
namespace {

grpc::Status too_many_requests() {
  return {grpc::StatusCode::RESOURCE_EXHAUSTED,
          "an envelope brings more requests than may wait for their answers"};
}

grpc::Status protocol_error(const absl::Status& status) {
  return {static_cast<grpc::StatusCode>(status.code()), std::string(status.message())};
}

// The beginning is enough to tell two fingerprints apart for a person.
std::string short_hex(const Fingerprint& fingerprint) {
  return absl::BytesToHexString(
      absl::string_view(reinterpret_cast<const char*>(fingerprint.data()), 4));
}

std::string short_name(const PublicKey& key) {
  return format_public_key(key).substr(0, 25);
}

bool all_finite(std::span<const float> values) {
  return std::all_of(values.begin(), values.end(), [](float x) { return std::isfinite(x); });
}

BodyServerOptions without_identity(BodyServerOptions options) {
  options.identity = nullptr;  // its owner may go
  return options;
}

AdmissionLimits admission_limits(const BodyServerOptions& options, const BodyInfo& info) {
  AdmissionLimits limits{.sessions = options.max_sessions,
                         .sessions_per_client = options.max_sessions_per_client,
                         .positions = std::numeric_limits<std::uint64_t>::max()};
  if (limits.sessions_per_client == 0) {
    const std::set<PublicKey> clients(options.allow.begin(), options.allow.end());
    limits.sessions_per_client =
        clients.size() == 1 ? options.max_sessions : std::max(1u, options.max_sessions / 2);
  }
  if (options.max_kv_bytes > 0) limits.positions = options.max_kv_bytes / info.kv_bytes_per_token;
  return limits;
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

ServerState::ServerState(Body& served, const BodyServerOptions& given)
    : body(served),
      options(without_identity(given)),
      identity(Identity::from_secret(given.identity->secret_key().copy())),
      max_frame(max_frame_bytes(given.max_rows_per_step, served.info().hidden_size)),
      admission(std::make_shared<Admission>(admission_limits(given, served.info()))),
      watchdog(std::make_unique<Watchdog>()),
      scheduler(std::make_unique<Scheduler>(served)) {}

Connection::Connection(std::shared_ptr<ServerState> server, std::string peer)
    : server_(std::move(server)), peer_(std::move(peer)) {}

void Connection::begin() {
  ++server_->connections;
  bool draining = false;
  {
    const std::lock_guard lock(server_->mutex);
    server_->open.insert(shared_from_this());
    draining = server_->draining;
  }
  if (draining) {
    fail({grpc::StatusCode::UNAVAILABLE, "the server is shutting down"});
    return;
  }
  limit_stage(Stage::kNothing, server_->options.handshake_timeout,
              "the handshake did not come in time");
  const std::lock_guard lock(mutex_);
  read_more();
}

void Connection::drain() {
  const std::lock_guard lock(mutex_);
  end({grpc::StatusCode::UNAVAILABLE, "the server is shutting down"}, false);
}

void Connection::OnReadDone(bool ok) {
  Stage stage{};
  {
    const std::lock_guard lock(mutex_);
    if (!ok) {
      // The client has nothing more to say, or is gone; what it asked for is still answered.
      end(grpc::Status::OK, false);
      return;
    }
    if (ending_) return;
    stage = stage_;
  }
  const grpc::Status status = stage == Stage::kNothing ? on_hello() : on_records(stage);
  if (!status.ok()) {
    fail(status);
    return;
  }
  const std::lock_guard lock(mutex_);
  reading_ = false;
  read_more();
}

void Connection::OnWriteDone(bool ok) {
  const std::lock_guard lock(mutex_);
  writing_ = false;
  outgoing_.pop_front();
  if (!ok) end({grpc::StatusCode::UNAVAILABLE, "the client went away"}, true);
  write_more();
  read_more();
  finish_when_ready();
}

void Connection::OnCancel() {
  const std::lock_guard lock(mutex_);
  end(grpc::Status::CANCELLED, true);
}

void Connection::OnDone() {
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

grpc::Status Connection::refuse(grpc::Status status) {
  ++server_->refused;
  log_to(server_->options.log, LogLevel::kWarning,
         "refused " + peer_ + ": " + status.error_message());
  return status;
}

grpc::Status Connection::on_hello() {
  const std::vector<CipherSuite>& ciphers = server_->options.ciphers;
  const std::optional<CipherSuite> suite =
      cipher_suite_from_number(static_cast<std::uint32_t>(incoming_.hello().cipher()));
  if (!incoming_.has_hello()) {
    return refuse({grpc::StatusCode::INVALID_ARGUMENT, "the first message is no hello"});
  }
  if (incoming_.hello().version() != kProtocolVersion || !suite ||
      std::find(ciphers.begin(), ciphers.end(), *suite) == ciphers.end()) {
    v1::Envelope envelope;
    envelope.mutable_refusal()->add_versions(kProtocolVersion);
    for (const CipherSuite cipher : ciphers) {
      envelope.mutable_refusal()->add_ciphers(static_cast<v1::Cipher>(cipher));
    }
    ++server_->refused;
    const std::lock_guard lock(mutex_);
    outgoing_.push_back(std::move(envelope));
    write_more();
    end({grpc::StatusCode::FAILED_PRECONDITION,
         "the server does not speak this protocol version or cipher"},
        false);
    return grpc::Status::OK;
  }

  const std::string prologue = noise_prologue(kProtocolVersion, *suite);
  absl::StatusOr<NoiseHandshake> handshake =
      NoiseHandshake::responder(*suite, bytes_of(prologue), server_->identity);
  if (!handshake.ok()) return refuse(protocol_error(handshake.status()));
  std::string payload;
  const bool size_fits = incoming_.data().size() == kNoiseMessage1Size;
  if (!size_fits || !handshake->read_message(bytes_of(incoming_.data()), payload).ok()) {
    return refuse(
        {grpc::StatusCode::UNAUTHENTICATED, "the handshake was not made for this server's key"});
  }
  if (!contains_key(server_->options.allow, handshake->remote_static())) {
    return refuse(
        {grpc::StatusCode::PERMISSION_DENIED, "the client's key is not on this server's list"});
  }
  v1::Envelope envelope;
  absl::Status status = handshake->write_message({}, *envelope.mutable_data());
  absl::StatusOr<NoiseTransport> transport =
      status.ok() ? handshake->split() : absl::StatusOr<NoiseTransport>(status);
  if (!transport.ok()) return refuse(protocol_error(transport.status()));

  client_ = transport->remote_static;
  opener_ = std::make_unique<FrameOpener>(std::move(transport->receive));
  limit_stage(Stage::kHello, server_->options.first_frame_timeout,
              "no frame followed the handshake in time");
  const std::lock_guard lock(mutex_);
  sealer_ = std::make_unique<FrameSealer>(std::move(transport->send));
  stage_ = Stage::kHello;
  outgoing_.push_back(std::move(envelope));
  write_more();
  return grpc::Status::OK;
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
        self->end({grpc::StatusCode::DEADLINE_EXCEEDED, missing}, true);
      });
}

grpc::Status Connection::on_records(Stage stage) {
  if (incoming_.has_hello()) {
    return {grpc::StatusCode::INVALID_ARGUMENT, "a second hello on one stream"};
  }
  std::vector<std::string> frames;
  const std::size_t max_frame = opened_once_ ? server_->max_frame : kMaxFrameOverhead;
  if (absl::Status status = opener_->open(bytes_of(incoming_.data()), max_frame, frames);
      !status.ok()) {
    return stage == Stage::kHello ? refuse(protocol_error(status)) : protocol_error(status);
  }
  if (stage == Stage::kHello) on_proof();
  if (frames.size() > server_->options.max_pending_per_connection) return too_many_requests();
  for (const std::string& bytes : frames) {
    absl::StatusOr<Frame> frame = decode_frame(bytes_of(bytes));
    if (!frame.ok()) return protocol_error(frame.status());
    if (grpc::Status status = on_frame(*std::move(frame)); !status.ok()) return status;
  }
  return grpc::Status::OK;
}

grpc::Status Connection::on_frame(Frame frame) {
  if (const auto* close = std::get_if<CloseFrame>(&frame.kind)) {
    sessions_.erase(close->session);
    return grpc::Status::OK;
  }
  auto* open = std::get_if<OpenFrame>(&frame.kind);
  auto* step = std::get_if<StepFrame>(&frame.kind);
  if (open == nullptr && step == nullptr) {
    return {grpc::StatusCode::INVALID_ARGUMENT, "a frame that only a server sends"};
  }
  {
    const std::lock_guard lock(mutex_);
    // Only an envelope that holds several frames comes here with as many pending.
    if (pending_ >= server_->options.max_pending_per_connection) return too_many_requests();
    ++pending_;
  }
  if (open != nullptr) {
    absl::StatusOr<OpenedFrame> opened = open_session(*open);
    if (opened.ok()) {
      answer(frame.request, *std::move(opened));
    } else {
      answer(frame.request, ErrorFrame{opened.status()});
    }
  } else if (absl::Status status = submit_step(frame.request, *step); !status.ok()) {
    answer(frame.request, ErrorFrame{status});
  }
  return grpc::Status::OK;
}

absl::StatusOr<OpenedFrame> Connection::open_session(const OpenFrame& open) {
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
                      .body = info.description}};
}

absl::Status Connection::submit_step(std::uint64_t request, const StepFrame& step) {
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
  const std::size_t hidden_size = info.hidden_size;
  const std::size_t row_bytes = wire_row_bytes(dtype, hidden_size);
  std::vector<std::byte> wire;
  if (absl::Status status = unpack_tensor(step.tensor, step.rows * row_bytes, wire); !status.ok()) {
    return status;
  }
  StepJob job{.session = found->second,
              .start_pos = step.start_pos,
              .rows = step.rows,
              .wanted = step.wanted,
              .states = std::vector<float>(step.rows * hidden_size)};
  for (std::size_t i = 0; i < step.rows; ++i) {
    const std::span<float> row = std::span<float>(job.states).subspan(i * hidden_size, hidden_size);
    decode_wire_row(dtype, wire.data() + i * row_bytes, row);
    if (!all_finite(row)) {
      return absl::InvalidArgumentError(
          absl::StrCat("row ", i, " of the step holds a value that is not finite"));
    }
  }
  // Last, so that a step that is refused takes no room.
  const std::uint32_t end = step.start_pos + step.rows;
  if (absl::Status status = found->second->lease->reserve(end); !status.ok()) return status;
  job.abandoned = [self = shared_from_this()] { return self->gone_.load(); };
  job.done = [self = shared_from_this(), request, dtype](StepJob& done) {
    self->on_step_done(request, dtype, done);
  };
  server_->scheduler->submit(std::move(job));
  return absl::OkStatus();
}

// ---- answers ----

void Connection::on_step_done(std::uint64_t request, WireDtype dtype, StepJob& job) {
  ++server_->steps;
  if (!job.status.ok()) {
    answer(request, ErrorFrame{job.status});
    return;
  }
  if (!all_finite(job.out)) {
    answer(request, ErrorFrame{absl::InternalError(
                        "the body computed a value that is not finite; is its folder damaged?")});
    return;
  }
  const std::size_t hidden_size = server_->body.info().hidden_size;
  const std::size_t row_bytes = wire_row_bytes(dtype, hidden_size);
  const std::size_t rows = job.out.size() / hidden_size;
  std::vector<std::byte> wire(rows * row_bytes);
  for (std::size_t i = 0; i < rows; ++i) {
    encode_wire_row(dtype, std::span<const float>(job.out).subspan(i * hidden_size, hidden_size),
                    wire.data() + i * row_bytes);
  }
  answer(request, OutputFrame{.rows = static_cast<std::uint32_t>(rows),
                              .kv_len = job.kv_len,
                              .compute_ms = job.compute_ms,
                              .tensor = pack_tensor(dtype, wire)});
}

void Connection::answer(std::uint64_t request, decltype(Frame::kind) kind) {
  const std::string bytes = encode_frame({request, std::move(kind)});
  const std::lock_guard lock(mutex_);
  --pending_;
  if (!gone_) {
    // Encrypted in the order of writing: the nonces follow it.
    for (std::span<const std::byte> rest = bytes_of(bytes); !rest.empty();) {
      v1::Envelope envelope;
      if (absl::Status status = sealer_->seal(rest, *envelope.mutable_data()); !status.ok()) {
        end(protocol_error(status), true);
        break;
      }
      outgoing_.push_back(std::move(envelope));
    }
    write_more();
    read_more();
  }
  finish_when_ready();
}

void Connection::fail(grpc::Status status) {
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
  StartRead(&incoming_);
}

void Connection::write_more() {
  if (writing_ || finished_ || outgoing_.empty()) return;
  writing_ = true;
  StartWrite(&outgoing_.front());
}

void Connection::end(grpc::Status status, bool at_once) {
  if (!ending_) ending_ = std::move(status);
  if (at_once) {
    gone_ = true;
    // Except for the envelope that gRPC is writing.
    outgoing_.resize(writing_ ? 1 : 0);
  }
  finish_when_ready();
}

void Connection::finish_when_ready() {
  if (finished_ || !ending_ || writing_) return;
  if (!gone_ && (pending_ > 0 || !outgoing_.empty())) return;
  finished_ = true;
  gone_ = true;
  Finish(*ending_);
}

}  // namespace infemeral
