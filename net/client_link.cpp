#include "net/client_link.h"

#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "net/bytes.h"
#include "net/channel.h"
#include "net/frames.h"
#include "net/watchdog.h"
#include "proto/split_inference.grpc.pb.h"

namespace infemeral {
namespace {

using Bytes = std::span<const std::byte>;
using Stream = grpc::ClientReaderWriter<v1::Envelope, v1::Envelope>;

// A dead line is noticed after at most their sum, also while the body computes.
constexpr int kKeepaliveTimeMs = 10000;
constexpr int kKeepaliveTimeoutMs = 5000;

// Closing is best effort: nobody waits longer for a server that does not answer.
constexpr std::chrono::milliseconds kCloseTimeout{1000};

// What gRPC or an unauthenticated server says, fit for a terminal.
std::string printable(std::string text) {
  text.resize(std::min(text.size(), kMaxTextBytes));
  std::replace_if(
      text.begin(), text.end(), [](char c) { return c < ' ' || c > '~'; }, '?');
  return text;
}

bool is_loopback(std::string_view server) {
  return server.starts_with("localhost:") || server.starts_with("127.") ||
         server.starts_with("[::1]:");
}

absl::Status check_options(const ClientLinkOptions& options) {
  if (options.identity == nullptr) {
    return absl::InvalidArgumentError("a link needs the client's identity");
  }
  if (options.hidden_size < 1 || options.hidden_size > kMaxHiddenSize) {
    return absl::InvalidArgumentError(
        absl::StrCat("a link for hidden size ", options.hidden_size, " cannot be made"));
  }
  const std::size_t colon = options.server.rfind(':');
  if (colon == std::string::npos || colon == 0 || colon + 1 == options.server.size()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "the server address \"", printable(options.server), "\" is not of the form host:port"));
  }
  if (options.force_cipher && !cipher_suite_available(*options.force_cipher)) {
    return absl::UnimplementedError(absl::StrCat("this processor has no instructions for ",
                                                 cipher_suite_name(*options.force_cipher)));
  }
  return absl::OkStatus();
}

std::shared_ptr<grpc::Channel> make_channel(const std::string& server) {
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, kKeepaliveTimeMs);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepaliveTimeoutMs);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  arguments.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  // A link has its own connection; it does not inherit another one's back-off.
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  if (is_loopback(server)) arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  arguments.SetMaxReceiveMessageSize(kMaxEnvelopeBytes);
  // Noise authenticates and encrypts; TLS underneath would be a second time.
  return grpc::CreateCustomChannel(server, grpc::InsecureChannelCredentials(), arguments);
}

// Cancels a call when its time is up or the caller wants to stop; for the scope of one operation.
class Interrupt {
 public:
  Interrupt(Watchdog& watchdog, grpc::ClientContext& context, std::chrono::milliseconds timeout,
            const std::stop_token& stop)
      : watchdog_(watchdog),
        ticket_(watchdog.arm(Watchdog::Clock::now() + timeout,
                             [this, &context] {
                               timed_out_ = true;
                               context.TryCancel();
                             })),
        on_stop_(stop, [this, &context] {
          stopped_ = true;
          context.TryCancel();
        }) {}
  ~Interrupt() { watchdog_.disarm(ticket_); }
  Interrupt(const Interrupt&) = delete;
  Interrupt& operator=(const Interrupt&) = delete;

  bool timed_out() const { return timed_out_; }
  bool stopped() const { return stopped_; }

 private:
  std::atomic<bool> timed_out_ = false;
  std::atomic<bool> stopped_ = false;
  Watchdog& watchdog_;
  const Watchdog::Ticket ticket_;
  std::stop_callback<std::function<void()>> on_stop_;
};

class ClientLink : public Link {
 public:
  explicit ClientLink(const ClientLinkOptions& options)
      : options_(options),
        own_name_(format_public_key(options.identity->public_key())),
        channel_(make_channel(options.server)),
        stub_(v1::SplitInference::NewStub(channel_)) {}

  ~ClientLink() override { hang_up(); }

  absl::Status connect(const std::stop_token& stop);

  absl::StatusOr<SessionInfo> open_session(std::stop_token stop) override;
  absl::Status step(const StepRequest& request, std::stop_token stop, StepReply& reply,
                    PhaseTimes& times) override;
  void close_session(std::uint64_t session) override;
  LinkCounters counters() const override { return counters_; }
  std::string cipher() const override { return cipher_suite_name(suite_); }

 private:
  // One handshake. `offered` is what the server accepts instead, when it refused this suite.
  absl::Status shake_hands(CipherSuite suite, Interrupt& interrupt,
                           std::optional<CipherSuite>& offered);
  absl::Status check_refusal(const v1::Refusal& refusal, CipherSuite suite,
                             std::optional<CipherSuite>& offered) const;

  absl::Status ready(const std::stop_token& stop) const;
  bool write(const v1::Envelope& envelope);
  bool read(v1::Envelope& envelope);
  absl::Status send(const std::string& frame, Interrupt& interrupt, PhaseTimes& times);
  // The answer to the last request. The server's Error frame becomes its status; any other failure
  // has given the link up.
  absl::StatusOr<Frame> receive(std::size_t max_answer, Interrupt& interrupt, PhaseTimes& times);
  absl::Status check_step(const StepRequest& request) const;

  // Why the stream broke, from the interrupt or from gRPC's status.
  absl::Status broken(const Interrupt& interrupt, bool connecting);
  absl::Status explain(const grpc::Status& status, bool connecting) const;
  absl::Status give_up(absl::Status status);
  void hang_up();

  const ClientLinkOptions options_;  // its identity is not used after connect()
  const std::string own_name_;
  const std::shared_ptr<grpc::Channel> channel_;
  const std::unique_ptr<v1::SplitInference::Stub> stub_;
  Watchdog watchdog_;

  std::unique_ptr<grpc::ClientContext> context_;
  std::unique_ptr<Stream> stream_;  // null once the link is given up
  absl::Status fatal_;              // why it was
  CipherSuite suite_ = CipherSuite::kAesGcm;
  std::unique_ptr<FrameSealer> sealer_;
  std::unique_ptr<FrameOpener> opener_;
  std::uint64_t request_ = 0;
  std::map<std::uint64_t, SessionInfo> sessions_;
  LinkCounters counters_;
};

// ---- connection ----

absl::Status ClientLink::connect(const std::stop_token& stop) {
  const auto deadline = Watchdog::Clock::now() + options_.connect_timeout;
  CipherSuite suite = options_.force_cipher.value_or(cipher_suite_available(CipherSuite::kAesGcm)
                                                         ? CipherSuite::kAesGcm
                                                         : CipherSuite::kChaChaPoly);
  for (int attempt = 0;; ++attempt) {
    if (stop.stop_requested()) return absl::CancelledError("stopped before connecting");
    context_ = std::make_unique<grpc::ClientContext>();
    // The first envelope leaves together with the call's headers.
    context_->set_initial_metadata_corked(true);
    std::optional<CipherSuite> offered;
    absl::Status status;
    {
      const auto left =
          std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Watchdog::Clock::now());
      Interrupt interrupt(watchdog_, *context_, left, stop);
      stream_ = stub_->Session(context_.get());
      status = shake_hands(suite, interrupt, offered);
    }
    if (status.ok()) return status;
    hang_up();
    if (!offered || attempt > 0) return status;
    suite = *offered;
  }
}

absl::Status ClientLink::shake_hands(CipherSuite suite, Interrupt& interrupt,
                                     std::optional<CipherSuite>& offered) {
  const std::string prologue = noise_prologue(kProtocolVersion, suite);
  absl::StatusOr<NoiseHandshake> handshake =
      NoiseHandshake::initiator(suite, bytes_of(prologue), *options_.identity, options_.server_key);
  if (!handshake.ok()) return handshake.status();

  v1::Envelope envelope;
  envelope.mutable_hello()->set_version(kProtocolVersion);
  envelope.mutable_hello()->set_cipher(static_cast<v1::Cipher>(suite));
  if (absl::Status status = handshake->write_message({}, *envelope.mutable_data()); !status.ok()) {
    return absl::UnauthenticatedError("the pinned server key is not a valid key");
  }
  v1::Envelope answer;
  if (!write(envelope) || !read(answer)) return broken(interrupt, true);
  if (answer.has_refusal()) return check_refusal(answer.refusal(), suite, offered);

  std::string payload;
  if (answer.data().size() != kNoiseMessage2Size ||
      !handshake->read_message(bytes_of(answer.data()), payload).ok()) {
    return absl::UnauthenticatedError(
        absl::StrCat(options_.server,
                     " does not prove that it holds the pinned server key; check --server-key"));
  }
  absl::StatusOr<NoiseTransport> transport = handshake->split();
  if (!transport.ok()) return transport.status();
  suite_ = suite;
  sealer_ = std::make_unique<FrameSealer>(std::move(transport->send));
  opener_ = std::make_unique<FrameOpener>(std::move(transport->receive));
  ++counters_.handshakes;
  log_to(options_.log, LogLevel::kDebug,
         absl::StrCat("connected to ", options_.server, " with ", cipher()));
  return absl::OkStatus();
}

absl::Status ClientLink::check_refusal(const v1::Refusal& refusal, CipherSuite suite,
                                       std::optional<CipherSuite>& offered) const {
  if (std::count(refusal.versions().begin(), refusal.versions().end(), kProtocolVersion) == 0) {
    return absl::FailedPreconditionError(absl::StrCat(
        options_.server, " speaks protocol version ", absl::StrJoin(refusal.versions(), ", "),
        " and this client ", kProtocolVersion, "; install the same release on both"));
  }
  for (const int number : refusal.ciphers()) {
    const auto other = cipher_suite_from_number(static_cast<std::uint32_t>(number));
    if (other && *other != suite && !options_.force_cipher && cipher_suite_available(*other)) {
      offered = other;
    }
  }
  return absl::FailedPreconditionError(
      absl::StrCat(options_.server, " does not accept ", cipher_suite_name(suite),
                   options_.force_cipher ? ", which was asked for"
                                         : ", and offers nothing that this client has"));
}

// The end of a stream is never InvalidArgument, Unimplemented or ResourceExhausted, which a caller
// takes for the fault of one request, after which it may send the next.
absl::Status ClientLink::explain(const grpc::Status& status, bool connecting) const {
  const std::string& server = options_.server;
  const std::string message = printable(status.error_message());
  switch (status.error_code()) {
    case grpc::StatusCode::UNAUTHENTICATED:
      return absl::UnauthenticatedError(absl::StrCat(
          server,
          " does not hold the pinned server key; check --server-key against the public key "
          "that the server prints"));
    case grpc::StatusCode::PERMISSION_DENIED:
      return absl::PermissionDeniedError(absl::StrCat(server, " does not know this client; add ",
                                                      own_name_, " to its allow list"));
    case grpc::StatusCode::UNIMPLEMENTED:
      return absl::FailedPreconditionError(absl::StrCat(
          server, " is a gRPC server but not an Infemeral one, or not of this version"));
    case grpc::StatusCode::FAILED_PRECONDITION:
      return absl::FailedPreconditionError(absl::StrCat(server, " refused: ", message));
    case grpc::StatusCode::RESOURCE_EXHAUSTED:
      return absl::UnavailableError(absl::StrCat(server, " refused: ", message));
    case grpc::StatusCode::INVALID_ARGUMENT:
    case grpc::StatusCode::DATA_LOSS:
      return absl::DataLossError(absl::StrCat(server, " could not read this client: ", message));
    case grpc::StatusCode::DEADLINE_EXCEEDED:
      return absl::DeadlineExceededError(absl::StrCat(server, " gave up waiting: ", message));
    default:
      break;
  }
  if (!connecting) {
    return absl::UnavailableError(absl::StrCat("the connection to ", server, " broke: ",
                                               message.empty() ? "the server ended it" : message));
  }
  if (message.find("Connection refused") != std::string::npos) {
    return absl::UnavailableError(absl::StrCat(
        "cannot reach ", server, ": connection refused; is engine_serve running there?"));
  }
  return absl::UnavailableError(absl::StrCat("cannot reach ", server, ": ", message));
}

absl::Status ClientLink::broken(const Interrupt& interrupt, bool connecting) {
  // Our own reasons first: gRPC only knows that the call was cancelled.
  if (interrupt.stopped() || interrupt.timed_out()) context_->TryCancel();
  const grpc::Status status = stream_->Finish();
  stream_.reset();
  if (interrupt.stopped()) return absl::CancelledError("stopped");
  if (interrupt.timed_out()) {
    const auto timeout = connecting ? options_.connect_timeout : options_.step_timeout;
    return absl::DeadlineExceededError(
        absl::StrCat("no answer from ", options_.server, " within ", timeout.count(), " ms"));
  }
  return explain(status, connecting);
}

absl::Status ClientLink::give_up(absl::Status status) {
  if (stream_) {
    context_->TryCancel();
    stream_->Finish();
    stream_.reset();
  }
  sessions_.clear();
  // A later call was not cancelled: it finds that the connection is gone.
  fatal_ = absl::IsCancelled(status)
               ? absl::UnavailableError(
                     "the connection was given up after a cancellation; connect again")
               : status;
  return status;
}

void ClientLink::hang_up() {
  if (!stream_) return;
  const Interrupt interrupt(watchdog_, *context_, kCloseTimeout, {});
  stream_->WritesDone();
  v1::Envelope rest;
  while (stream_->Read(&rest)) {
  }
  stream_->Finish();
  stream_.reset();
}

// ---- frames ----

absl::Status ClientLink::ready(const std::stop_token& stop) const {
  if (!fatal_.ok()) return fatal_;
  if (stop.stop_requested()) return absl::CancelledError("stopped");
  return absl::OkStatus();
}

bool ClientLink::write(const v1::Envelope& envelope) {
  counters_.bytes_up += envelope.ByteSizeLong();
  return stream_->Write(envelope);
}

bool ClientLink::read(v1::Envelope& envelope) {
  if (!stream_->Read(&envelope)) return false;
  counters_.bytes_down += envelope.ByteSizeLong();
  return true;
}

absl::Status ClientLink::send(const std::string& frame, Interrupt& interrupt, PhaseTimes& times) {
  PhaseClock clock;
  v1::Envelope envelope;
  for (Bytes rest = bytes_of(frame); !rest.empty();) {
    if (absl::Status status = sealer_->seal(rest, *envelope.mutable_data()); !status.ok()) {
      return give_up(absl::UnavailableError(status.message()));
    }
    clock.lap(times.encrypt_ms);
    if (!write(envelope)) return give_up(broken(interrupt, false));
    clock.lap(times.network_ms);
  }
  return absl::OkStatus();
}

absl::StatusOr<Frame> ClientLink::receive(std::size_t max_answer, Interrupt& interrupt,
                                          PhaseTimes& times) {
  PhaseClock clock;
  std::vector<std::string> frames;
  v1::Envelope envelope;
  while (frames.empty()) {
    const bool got = read(envelope);
    clock.lap(times.network_ms);
    if (!got) return give_up(broken(interrupt, false));
    absl::Status status = opener_->open(bytes_of(envelope.data()), max_answer, frames);
    clock.lap(times.decrypt_ms);
    if (!status.ok()) return give_up(absl::DataLossError(status.message()));
  }
  absl::StatusOr<Frame> answer = decode_frame(bytes_of(frames.front()));
  clock.lap(times.decode_ms);
  if (!answer.ok()) {
    return give_up(absl::DataLossError(
        absl::StrCat("the server's answer cannot be read: ", answer.status().message())));
  }
  if (frames.size() != 1 || answer->request != request_) {
    return give_up(absl::DataLossError("the server answered something that was not asked"));
  }
  if (const auto* error = std::get_if<ErrorFrame>(&answer->kind)) return error->status;
  return answer;
}

absl::StatusOr<SessionInfo> ClientLink::open_session(std::stop_token stop) {
  if (absl::Status status = ready(stop); !status.ok()) return status;
  Interrupt interrupt(watchdog_, *context_, options_.step_timeout, stop);
  PhaseTimes times;
  const std::string frame =
      encode_frame({++request_, OpenFrame{options_.model_fingerprint, options_.cloak_commitment,
                                          static_cast<std::uint32_t>(options_.hidden_size)}});
  if (absl::Status status = send(frame, interrupt, times); !status.ok()) return status;
  absl::StatusOr<Frame> answer = receive(kMaxFrameOverhead, interrupt, times);
  if (!answer.ok()) return answer.status();
  const auto* opened = std::get_if<OpenedFrame>(&answer->kind);
  if (opened == nullptr || opened->session.hidden_size != options_.hidden_size) {
    return give_up(absl::DataLossError("the server opened something that was not asked for"));
  }
  sessions_[opened->session.id] = opened->session;
  return opened->session;
}

absl::Status ClientLink::check_step(const StepRequest& request) const {
  const auto found = sessions_.find(request.session);
  if (found == sessions_.end()) {
    return absl::NotFoundError("this link has no such session; open one");
  }
  if (request.rows < 1 || request.rows > found->second.max_rows) {
    return absl::InvalidArgumentError(absl::StrCat(
        "a step of ", request.rows, " rows; the server takes 1 to ", found->second.max_rows));
  }
  const std::uint32_t max_context = found->second.max_context;
  if (request.rows > max_context || request.start_pos > max_context - request.rows) {
    return absl::InvalidArgumentError(absl::StrCat(
        request.rows, " rows from position ", request.start_pos,
        " do not fit the server's context of ", max_context, "; shorten the prompt or the answer"));
  }
  const std::size_t expected = request.rows * wire_row_bytes(request.dtype, options_.hidden_size);
  if (request.tensor.size() != expected) {
    return absl::InvalidArgumentError(
        absl::StrCat(request.rows, " rows of ", std::string(wire_dtype_name(request.dtype)),
                     " are ", expected, " bytes, not ", request.tensor.size()));
  }
  return absl::OkStatus();
}

absl::Status ClientLink::step(const StepRequest& request, std::stop_token stop, StepReply& reply,
                              PhaseTimes& times) {
  if (absl::Status status = ready(stop); !status.ok()) return status;
  if (absl::Status status = check_step(request); !status.ok()) return status;
  Interrupt interrupt(watchdog_, *context_, options_.step_timeout, stop);
  PhaseClock clock;
  const std::string frame =
      encode_frame({++request_, StepFrame{.session = request.session,
                                          .start_pos = request.start_pos,
                                          .rows = request.rows,
                                          .wanted = request.wanted,
                                          .tensor = pack_tensor(request.dtype, request.tensor)}});
  clock.lap(times.encode_ms);
  const double network_before = times.network_ms;
  if (absl::Status status = send(frame, interrupt, times); !status.ok()) return status;
  const std::uint32_t rows_back = output_rows(request.wanted, request.rows);
  const std::size_t expected = rows_back * wire_row_bytes(request.dtype, options_.hidden_size);
  absl::StatusOr<Frame> answer = receive(expected + kMaxFrameOverhead, interrupt, times);
  if (!answer.ok()) return answer.status();

  PhaseClock unpack_clock;
  auto* output = std::get_if<OutputFrame>(&answer->kind);
  const bool fits = output != nullptr && output->rows == rows_back &&
                    output->kv_len == request.start_pos + request.rows &&
                    (output->rows == 0 || output->tensor.dtype == request.dtype);
  if (!fits || !unpack_tensor(output->tensor, expected, reply.tensor).ok()) {
    return give_up(absl::DataLossError("the server's answer does not fit the step"));
  }
  reply.rows = output->rows;
  reply.kv_len = output->kv_len;
  unpack_clock.lap(times.decode_ms);
  // The body's own figure, but never more than the wait that it is part of.
  const double body_ms = std::min(output->compute_ms, times.network_ms - network_before);
  times.network_ms -= body_ms;
  times.body_ms += body_ms;

  ++counters_.steps;
  counters_.tensor_bytes_up += request.tensor.size();
  counters_.tensor_bytes_down += expected;
  return absl::OkStatus();
}

void ClientLink::close_session(std::uint64_t session) {
  if (!fatal_.ok() || sessions_.erase(session) == 0) return;
  Interrupt interrupt(watchdog_, *context_, kCloseTimeout, {});
  PhaseTimes times;
  // A failure gives the link up, which the next call reports.
  (void)send(encode_frame({++request_, CloseFrame{session}}), interrupt, times);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Link>> connect_link(const ClientLinkOptions& options,
                                                   const std::stop_token& stop) {
  if (absl::Status status = check_options(options); !status.ok()) return status;
  auto link = std::make_unique<ClientLink>(options);
  if (absl::Status status = link->connect(stop); !status.ok()) return status;
  return std::unique_ptr<Link>(std::move(link));
}

}  // namespace infemeral
