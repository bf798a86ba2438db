#include "net/body_server.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>

#include <algorithm>
#include <mutex>
#include <utility>

#include "absl/strings/str_cat.h"
#include "net/address.h"
#include "net/connection.h"
#include "net/listener.h"
#include "net/tls_credentials.h"
#include "proto/split_inference.grpc.pb.h"

namespace infemeral {
namespace {

// Clients ping every 10 s, also between calls; gRPC's default would cut them off as abusive.
constexpr int kMinPingIntervalMs = 5000;
// A client that has vanished is noticed after at most their sum. Until then it holds its sessions,
// which it may need itself when it comes back.
constexpr int kKeepaliveTimeMs = 10000;
constexpr int kKeepaliveTimeoutMs = 5000;
// Without a stream a connection is nobody's: a client opens one at once, and a health check
// connects again.
constexpr int kIdleMs = 30000;
// A client needs one, and a health check another; nobody gets more for one connection's price.
constexpr int kStreamsPerConnection = 32;
constexpr int kReflectionThreads = 8;

// A connection's stream over gRPC, which reports each event on some thread of its own.
class GrpcStream final : public grpc::ServerBidiReactor<v1::Envelope, v1::Envelope>,
                         public EnvelopeStream {
 public:
  GrpcStream(std::shared_ptr<ServerState> state, std::string peer)
      : connection_(std::make_shared<Connection>(std::move(state), *this, std::move(peer))) {
    connection_->begin();
  }

  void start_read(v1::Envelope& envelope) override { StartRead(&envelope); }
  void start_write(const v1::Envelope& envelope) override { StartWrite(&envelope); }
  void finish(const absl::Status& status) override {
    Finish({static_cast<grpc::StatusCode>(status.code()), std::string(status.message())});
  }

  void OnReadDone(bool ok) override { connection_->on_read_done(ok); }
  void OnWriteDone(bool ok) override { connection_->on_write_done(ok); }
  void OnCancel() override { connection_->on_cancel(); }
  void OnDone() override {
    connection_->on_done();
    delete this;
  }

 private:
  const std::shared_ptr<Connection> connection_;
};

class Service : public v1::SplitInference::CallbackService {
 public:
  explicit Service(std::shared_ptr<ServerState> state) : state_(std::move(state)) {}

  grpc::ServerBidiReactor<v1::Envelope, v1::Envelope>* Session(
      grpc::CallbackServerContext* context) override {
    return new GrpcStream(state_, context->peer());  // deletes itself
  }

 private:
  const std::shared_ptr<ServerState> state_;
};

absl::Status check_allow(const std::vector<PublicKey>& allow) {
  if (!allow.empty()) return absl::OkStatus();
  return absl::InvalidArgumentError(
      "the body server needs the public key of at least one client that it serves");
}

absl::Status check_options(const Body& body, const BodyServerOptions& options) {
  if (options.identity == nullptr) {
    return absl::InvalidArgumentError("the body server needs an identity");
  }
  if (absl::Status status = check_allow(options.allow); !status.ok()) return status;
  if (body.info().hidden_size < 1 || body.info().hidden_size > kMaxHiddenSize) {
    return absl::InvalidArgumentError(
        absl::StrCat("a body of hidden size ", body.info().hidden_size, " cannot be served"));
  }
  if (options.max_rows_per_step < 1 || options.max_rows_per_step > kMaxFrameRows) {
    return absl::InvalidArgumentError(absl::StrCat(
        "max_rows_per_step is ", options.max_rows_per_step, ", not 1 to ", kMaxFrameRows));
  }
  if (options.max_sessions < 1 || options.max_pending_per_connection < 1) {
    return absl::InvalidArgumentError(
        "max_sessions and max_pending_per_connection must be at least 1");
  }
  const std::size_t kv_bytes_per_token = body.info().kv_bytes_per_token;
  if (options.max_kv_bytes > 0 &&
      (kv_bytes_per_token == 0 || options.max_kv_bytes < kv_bytes_per_token)) {
    return absl::InvalidArgumentError(absl::StrCat("max_kv_bytes is ", options.max_kv_bytes,
                                                   " and one position of the body takes ",
                                                   kv_bytes_per_token, "; no step would fit"));
  }
  return absl::OkStatus();
}

class GrpcBodyServer final : public BodyServer {
 public:
  explicit GrpcBodyServer(std::shared_ptr<ServerState> state)
      : state_(std::move(state)), service_(state_) {}

  ~GrpcBodyServer() override { shutdown(std::chrono::milliseconds(0)); }

  absl::Status listen() {
    absl::StatusOr<std::unique_ptr<Listener>> listener =
        Listener::open(state_->options.listen, state_->options.log);
    if (!listener.ok()) return listener.status();
    grpc::EnableDefaultHealthCheckService(true);
    grpc::reflection::InitProtoReflectionServerBuilderPlugin();
    grpc::ServerBuilder builder;
    builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, kKeepaliveTimeMs);
    builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepaliveTimeoutMs);
    builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
    builder.AddChannelArgument(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
    builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS,
                               kMinPingIntervalMs);
    builder.AddChannelArgument(GRPC_ARG_SERVER_HANDSHAKE_TIMEOUT_MS,
                               static_cast<int>(state_->options.handshake_timeout.count()));
    builder.AddChannelArgument(GRPC_ARG_MAX_CONNECTION_IDLE_MS, kIdleMs);
    builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, kStreamsPerConnection);
    builder.SetMaxReceiveMessageSize(kMaxEnvelopeBytes);
    acceptor_ = builder.experimental().AddExternalConnectionAcceptor(
        grpc::ServerBuilder::experimental_type::ExternalConnectionType::FROM_FD,
        server_credentials(state_->options.tls));
    // Reflection is served by threads that wait with their streams, and strangers may ask for it.
    builder.SetResourceQuota(grpc::ResourceQuota("body_server").SetMaxThreads(kReflectionThreads));
    builder.RegisterService(&service_);
    server_ = builder.BuildAndStart();
    if (!server_) return absl::InternalError("gRPC does not start a server");
    listener_ = *std::move(listener);
    port_ = listener_->port();
    listener_->start([this](int listening, int connection) {
      grpc::experimental::ExternalConnectionAcceptor::NewConnectionParameters accepted;
      accepted.listener_fd = listening;
      accepted.fd = connection;
      acceptor_->HandleNewConnection(&accepted);
    });
    if (!state_->options.tls && !is_loopback(state_->options.listen)) {
      log_to(
          state_->options.log, LogLevel::kInfo,
          "the transport has no TLS; the channel inside is encrypted and authenticated by Noise");
    }
    return absl::OkStatus();
  }

  int port() const override { return port_; }

  BodyServerCounters counters() const override {
    BodyServerCounters counters{
        .connections = state_->connections,
        .handshakes = state_->handshakes,
        .refused = state_->refused,
        .steps = state_->steps,
        .failed_steps = state_->failed_steps,
        .refused_sessions = state_->refused_sessions,
        .refused_steps = state_->refused_steps,
        .open_sessions = state_->admission->sessions(),
        .kv_bytes = state_->admission->positions() * state_->body.info().kv_bytes_per_token};
    {
      const std::lock_guard lock(state_->latency_mutex);
      counters.step_latency = state_->step_latency;
    }
    const std::lock_guard lock(state_->mutex);
    counters.open_connections = static_cast<std::uint32_t>(state_->open.size());
    if (state_->scheduler) counters.waiting_steps = state_->scheduler->waiting();
    return counters;
  }

  absl::Status set_allow(std::vector<PublicKey> allow) override {
    if (absl::Status status = check_allow(allow); !status.ok()) return status;
    state_->set_allow(std::move(allow));
    return absl::OkStatus();
  }

  void shutdown(std::chrono::milliseconds grace) override {
    const std::lock_guard once(shutdown_mutex_);
    if (!server_) return;
    if (auto* health = server_->GetHealthCheckService()) health->SetServingStatus(false);
    std::vector<std::shared_ptr<Connection>> open;
    {
      const std::lock_guard lock(state_->mutex);
      state_->draining = true;
      open.assign(state_->open.begin(), state_->open.end());
    }
    for (const auto& connection : open) connection->drain();
    open.clear();
    {
      // The port stays open meanwhile: a health check is told NOT_SERVING, a new client to go away.
      std::unique_lock lock(state_->mutex);
      state_->changed.wait_for(lock, grace, [&] { return state_->open.empty(); });
    }
    listener_.reset();
    server_->Shutdown(std::chrono::system_clock::now());
    std::unique_ptr<StepQueue> scheduler;
    {
      std::unique_lock lock(state_->mutex);
      state_->changed.wait(lock, [&] { return state_->open.empty(); });
      scheduler = std::move(state_->scheduler);
    }
    server_.reset();
    scheduler.reset();
    state_->watchdog.reset();
  }

 private:
  const std::shared_ptr<ServerState> state_;
  Service service_;
  std::unique_ptr<grpc::experimental::ExternalConnectionAcceptor> acceptor_;
  std::unique_ptr<grpc::Server> server_;
  std::unique_ptr<Listener> listener_;
  int port_ = 0;
  std::mutex shutdown_mutex_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<BodyServer>> BodyServer::start(Body& body,
                                                              BodyServerOptions options) {
  if (absl::Status status = check_options(body, options); !status.ok()) return status;
  std::vector<CipherSuite> ciphers;
  for (const CipherSuite suite : {CipherSuite::kAesGcm, CipherSuite::kChaChaPoly}) {
    const bool wanted = options.ciphers.empty() ||
                        std::count(options.ciphers.begin(), options.ciphers.end(), suite) > 0;
    if (wanted && cipher_suite_available(suite)) ciphers.push_back(suite);
  }
  if (ciphers.empty()) {
    return absl::UnimplementedError("this processor has none of the ciphers that are accepted");
  }
  options.ciphers = std::move(ciphers);
  auto scheduler = std::make_unique<Scheduler>(
      body, std::min(options.joined_rows, options.max_rows_per_step), options.quick_run);
  auto server = std::make_unique<GrpcBodyServer>(
      std::make_shared<ServerState>(body, options, std::move(scheduler)));
  if (absl::Status status = server->listen(); !status.ok()) return status;
  return std::unique_ptr<BodyServer>(std::move(server));
}

}  // namespace infemeral
