#include "net/body_server.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>

#include <algorithm>
#include <mutex>
#include <utility>

#include "absl/strings/str_cat.h"
#include "net/connection.h"
#include "proto/split_inference.grpc.pb.h"

namespace infemeral {
namespace {

// Clients ping every 10 s, also between calls; gRPC's default would cut them off as abusive.
constexpr int kMinPingIntervalMs = 5000;
// How soon the server notices that a client's machine has vanished.
constexpr int kKeepaliveTimeMs = 30000;
constexpr int kKeepaliveTimeoutMs = 10000;

class Service : public v1::SplitInference::CallbackService {
 public:
  explicit Service(std::shared_ptr<ServerState> state) : state_(std::move(state)) {}

  grpc::ServerBidiReactor<v1::Envelope, v1::Envelope>* Session(
      grpc::CallbackServerContext* context) override {
    const auto connection = std::make_shared<Connection>(state_, context->peer());
    connection->begin();
    return connection.get();
  }

 private:
  const std::shared_ptr<ServerState> state_;
};

absl::Status check_options(const Body& body, const BodyServerOptions& options) {
  if (options.identity == nullptr) {
    return absl::InvalidArgumentError("the body server needs an identity");
  }
  if (options.allow.empty()) {
    return absl::InvalidArgumentError(
        "the body server needs the public key of at least one client that it serves");
  }
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
    grpc::EnableDefaultHealthCheckService(true);
    grpc::reflection::InitProtoReflectionServerBuilderPlugin();
    grpc::ServerBuilder builder;
    // A second server on the same port is an error, not a partner.
    builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
    builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, kKeepaliveTimeMs);
    builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepaliveTimeoutMs);
    builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
    builder.AddChannelArgument(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
    builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS,
                               kMinPingIntervalMs);
    builder.AddChannelArgument(GRPC_ARG_SERVER_HANDSHAKE_TIMEOUT_MS,
                               static_cast<int>(state_->options.handshake_timeout.count()));
    builder.SetMaxReceiveMessageSize(kMaxEnvelopeBytes);
    builder.AddListeningPort(state_->options.listen, grpc::InsecureServerCredentials(), &port_);
    builder.RegisterService(&service_);
    server_ = builder.BuildAndStart();
    if (!server_ || port_ == 0) {
      server_.reset();
      return absl::UnavailableError(
          absl::StrCat("cannot listen on ", state_->options.listen,
                       "; is the address one of this machine's, and the port free and permitted?"));
    }
    return absl::OkStatus();
  }

  int port() const override { return port_; }

  BodyServerCounters counters() const override {
    BodyServerCounters counters{.connections = state_->connections,
                                .handshakes = state_->handshakes,
                                .refused = state_->refused,
                                .steps = state_->steps,
                                .open_sessions = state_->admission->sessions()};
    const std::lock_guard lock(state_->mutex);
    counters.open_connections = static_cast<std::uint32_t>(state_->open.size());
    if (state_->scheduler) counters.waiting_steps = state_->scheduler->waiting();
    return counters;
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
    server_->Shutdown(std::chrono::system_clock::now() + grace);
    std::unique_ptr<Scheduler> scheduler;
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
  std::unique_ptr<grpc::Server> server_;
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
  auto server = std::make_unique<GrpcBodyServer>(std::make_shared<ServerState>(body, options));
  if (absl::Status status = server->listen(); !status.ok()) return status;
  return std::unique_ptr<BodyServer>(std::move(server));
}

}  // namespace infemeral
