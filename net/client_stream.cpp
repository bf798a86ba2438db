#include "net/client_stream.h"

#include <algorithm>
#include <span>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "net/address.h"
#include "net/bytes.h"
#include "net/tls_credentials.h"

namespace infemeral {
namespace {

// A dead line is noticed after at most their sum, also while the body computes: with gRPC's timers,
// which come up to 0.1 s late, within 15 s.
constexpr int kKeepaliveTimeMs = 10000;
constexpr int kKeepaliveTimeoutMs = 4800;

// Whoever waits for longer does not notice 100 us.
constexpr std::chrono::milliseconds kAwaitedAnswer{50};

std::shared_ptr<grpc::Channel> make_channel(const ClientLinkOptions& options) {
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, kKeepaliveTimeMs);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepaliveTimeoutMs);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  arguments.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  // A name may have two addresses of which the first drops packets: the other one has its turn.
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS,
                   static_cast<int>(options.connect_timeout.count() / 2));
  // A link has its own connection; it does not inherit another one's back-off.
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  if (is_loopback(options.server)) arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  arguments.SetMaxReceiveMessageSize(kMaxEnvelopeBytes);
  return grpc::CreateCustomChannel(options.server, client_credentials(options.tls), arguments);
}

absl::Status given_up_by_cancellation() {
  return absl::UnavailableError("the connection was given up after a cancellation; connect again");
}

}  // namespace

ClientStream::Interrupt::Interrupt(ClientStream& stream, std::chrono::milliseconds timeout,
                                   const std::stop_token& stop)
    : watchdog_(stream.watchdog_),
      ticket_(watchdog_.arm(Watchdog::Clock::now() + timeout,
                            [&stream] {
                              stream.timed_out_ = true;
                              stream.context_->TryCancel();
                            })),
      on_stop_(stop, [this, &stream] {
        stopped_ = true;
        stream.stopped_ = true;
        stream.context_->TryCancel();
      }) {}

ClientStream::Interrupt::~Interrupt() {
  watchdog_.disarm(ticket_);
}

ClientStream::ClientStream(const ClientLinkOptions& options, Identity identity,
                           LinkCounters& counters)
    : options_(options), identity_(std::move(identity)), counters_(counters) {}

ClientStream::~ClientStream() {
  hang_up();
  queue_.Shutdown();
  (void)wait();  // for its end
}

// ---- connection ----

absl::Status ClientStream::connect(const std::stop_token& stop) {
  (void)give_up(absl::UnavailableError("the connection was given up for a new one"));
  if (absl::Status status = open(stop); !status.ok()) return give_up(status);
  error_ = absl::OkStatus();
  return error_;
}

absl::Status ClientStream::open(const std::stop_token& stop) {
  // A channel for each connection: an old one may hold on to a line that is dead without knowing
  // it.
  stub_ = v1::SplitInference::NewStub(make_channel(options_));
  const auto deadline = Watchdog::Clock::now() + options_.connect_timeout;
  CipherSuite suite = options_.force_cipher.value_or(cipher_suite_available(CipherSuite::kAesGcm)
                                                         ? CipherSuite::kAesGcm
                                                         : CipherSuite::kChaChaPoly);
  for (int attempt = 0;; ++attempt) {
    if (stop.stop_requested()) return absl::CancelledError("stopped before connecting");
    context_ = std::make_unique<grpc::ClientContext>();
    timed_out_ = stopped_ = false;
    // The first envelope leaves together with the call's headers.
    context_->set_initial_metadata_corked(true);
    std::optional<CipherSuite> offered;
    absl::Status status;
    {
      const auto left =
          std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Watchdog::Clock::now());
      Interrupt interrupt(*this, left, stop);
      stream_ = stub_->AsyncSession(context_.get(), &queue_, nullptr);
      status = shake_hands(suite, interrupt, offered);
    }
    // The time may have been over just after the answer came: the call is cancelled all the same.
    if (status.ok() && timed_out_) status = no_answer(options_.connect_timeout);
    if (status.ok()) return status;
    hang_up();
    if (!offered || attempt > 0) return status;
    suite = *offered;
  }
}

absl::Status ClientStream::shake_hands(CipherSuite suite, Interrupt& interrupt,
                                       std::optional<CipherSuite>& offered) {
  const std::string prologue = noise_prologue(kProtocolVersion, suite);
  absl::StatusOr<NoiseHandshake> handshake =
      NoiseHandshake::initiator(suite, bytes_of(prologue), identity_, options_.server_key);
  if (!handshake.ok()) return handshake.status();

  v1::Envelope envelope;
  envelope.mutable_hello()->set_version(kProtocolVersion);
  envelope.mutable_hello()->set_cipher(static_cast<v1::Cipher>(suite));
  if (absl::Status status = handshake->write_message({}, *envelope.mutable_data()); !status.ok()) {
    return absl::UnauthenticatedError("the pinned server key is not a valid key");
  }
  v1::Envelope answer;
  if (!write(envelope) || !read(answer)) return broken(interrupt, StreamStage::kConnecting);
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
  sealer_ = std::make_unique<FrameSealer>(std::move(transport->send), options_.rekey);
  opener_ = std::make_unique<FrameOpener>(std::move(transport->receive));
  ++counters_.handshakes;
  log_to(options_.log, LogLevel::kDebug,
         absl::StrCat("connected to ", options_.server, " with ", cipher_suite_name(suite)));
  return absl::OkStatus();
}

absl::Status ClientStream::check_refusal(const v1::Refusal& refusal, CipherSuite suite,
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

absl::Status ClientStream::broken(const Interrupt& interrupt, StreamStage stage) {
  // Our own reasons first: gRPC only knows that the call was cancelled.
  if (stopped_ || timed_out_) context_->TryCancel();
  const grpc::Status status = finish_stream();
  if (interrupt.stopped()) return absl::CancelledError("stopped");
  if (timed_out_) {
    return no_answer(stage == StreamStage::kConnecting ? options_.connect_timeout
                                                       : options_.step_timeout);
  }
  if (stopped_) return given_up_by_cancellation();
  return explain_stream_end(status, stage, options_, identity_.public_key());
}

absl::Status ClientStream::no_answer(std::chrono::milliseconds timeout) const {
  return absl::DeadlineExceededError(
      absl::StrCat("no answer from ", options_.server, " within ", timeout.count(), " ms"));
}

absl::Status ClientStream::give_up(absl::Status status) {
  if (stream_) {
    context_->TryCancel();
    (void)finish_stream();
  }
  // A later call was not cancelled: it finds that the connection is gone.
  error_ = absl::IsCancelled(status) ? given_up_by_cancellation() : status;
  return status;
}

void ClientStream::hang_up() {
  if (!stream_) return;
  const Interrupt interrupt(*this, kCloseTimeout, {});
  stream_->WritesDone(this);
  (void)wait();
  (void)finish_stream();
}

grpc::Status ClientStream::finish_stream() {
  // gRPC gives the status only to who has read what came before it, such as answers to steps that
  // were sent ahead.
  v1::Envelope unread;
  do {
    stream_->Read(&unread, this);
  } while (wait());
  grpc::Status status;
  stream_->Finish(&status, this);
  (void)wait();
  stream_.reset();
  return status;
}

// ---- frames ----

bool ClientStream::write(const v1::Envelope& envelope) {
  counters_.bytes_up += envelope.ByteSizeLong();
  stream_->Write(envelope, this);
  return wait();
}

bool ClientStream::read(v1::Envelope& envelope) {
  stream_->Read(&envelope, this);
  if (!(options_.spin ? wait_around() : wait())) return false;
  counters_.bytes_down += envelope.ByteSizeLong();
  return true;
}

bool ClientStream::wait() {
  void* tag = nullptr;
  bool ok = false;
  return queue_.Next(&tag, &ok) && ok;
}

bool ClientStream::wait_around() {
  using Clock = Watchdog::Clock;
  const Clock::time_point begin = Clock::now();
  const Clock::duration expected = std::exchange(last_wait_, Clock::duration::zero());
  void* tag = nullptr;
  bool ok = false;
  auto result = grpc::CompletionQueue::TIMEOUT;
  if (expected < kAwaitedAnswer) {
    const std::chrono::nanoseconds sleep = expected * 7 / 8;
    result = queue_.AsyncNext(&tag, &ok,
                              gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC),
                                           gpr_time_from_nanos(sleep.count(), GPR_TIMESPAN)));
    while (result == grpc::CompletionQueue::TIMEOUT && Clock::now() - begin < expected * 9 / 8) {
      result = queue_.AsyncNext(&tag, &ok, gpr_time_0(GPR_CLOCK_MONOTONIC));
    }
  }
  if (result == grpc::CompletionQueue::TIMEOUT) ok = wait();
  last_wait_ = Clock::now() - begin;
  return ok;
}

absl::Status ClientStream::send(const std::string& frame, Interrupt& interrupt, PhaseTimes& times) {
  PhaseClock clock;
  v1::Envelope envelope;
  for (std::span<const std::byte> rest = bytes_of(frame); !rest.empty();) {
    if (absl::Status status = sealer_->seal(rest, *envelope.mutable_data()); !status.ok()) {
      return give_up(absl::UnavailableError(status.message()));
    }
    clock.lap(times.encrypt_ms);
    if (!write(envelope)) return give_up(broken(interrupt, StreamStage::kOpen));
    clock.lap(times.network_ms);
  }
  return absl::OkStatus();
}

absl::StatusOr<Frame> ClientStream::receive(std::size_t max_frame, Interrupt& interrupt,
                                            PhaseTimes& times) {
  PhaseClock clock;
  std::vector<std::string> frames;
  v1::Envelope envelope;
  while (frames.empty()) {
    const bool got = read(envelope);
    clock.lap(times.network_ms);
    if (!got) return give_up(broken(interrupt, StreamStage::kOpen));
    absl::Status status = opener_->open(bytes_of(envelope.data()), max_frame, frames);
    clock.lap(times.decrypt_ms);
    if (!status.ok()) return give_up(absl::DataLossError(status.message()));
  }
  absl::StatusOr<Frame> frame = decode_frame(bytes_of(frames.front()));
  clock.lap(times.decode_ms);
  if (!frame.ok()) {
    return give_up(absl::DataLossError(
        absl::StrCat("the server's answer cannot be read: ", frame.status().message())));
  }
  if (frames.size() != 1) return give_up(not_asked());
  return frame;
}

}  // namespace infemeral
