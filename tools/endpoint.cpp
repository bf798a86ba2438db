#include "tools/endpoint.h"

#include <thread>

#include "cpu/body.h"
#include "engine/text.h"

namespace infemeral {
namespace {

// With fewer, a server on the same machine would miss the one that looks for answers.
constexpr unsigned kCoresToSpin = 4;

}  // namespace

absl::StatusOr<PublicKey> load_public_key(const std::string& text_or_file) {
  auto keys = read_public_keys(text_or_file);
  if (!keys.ok()) return keys.status();
  if (keys->size() != 1) {
    return absl::InvalidArgumentError(
        cat(text_or_file, " holds ", keys->size(), " keys; exactly one is needed"));
  }
  return keys->front();
}

absl::Status Endpoint::start_local(const EndpointOptions& options) {
  auto body = load_cpu_body(options.body_folder, {.threads = options.threads});
  if (absl::IsNotFound(body.status())) {
    return absl::NotFoundError(
        cat(body.status().message(), "; or give --server HOST:PORT, where the body is served"));
  }
  if (!body.ok()) return body.status();
  body_ = *std::move(body);

  // Both ends live in this process: keys that nobody else ever sees.
  const Identity server_identity = Identity::generate();
  identity_ = Identity::generate();
  auto server =
      BodyServer::start(*body_, {.identity = &server_identity, .allow = {identity_->public_key()}});
  if (!server.ok()) return server.status();
  server_ = *std::move(server);
  link_.server = cat("127.0.0.1:", server_->port());
  link_.server_key = server_identity.public_key();
  return absl::OkStatus();
}

absl::StatusOr<Endpoint> Endpoint::open(const EndpointOptions& options,
                                        const ClientManifest& manifest) {
  Endpoint endpoint;
  endpoint.link_ = {.server = options.server,
                    .model_fingerprint = manifest.model_fingerprint,
                    .cloak_commitment = manifest.cloak_commitment,
                    .hidden_size = manifest.hidden_size,
                    .connect_timeout = options.connect_timeout,
                    .step_timeout = options.step_timeout,
                    .pad = options.pad,
                    .log = options.log};
  if (options.server == "local") {
    if (!options.tls.empty()) {
      return absl::InvalidArgumentError(
          "--tls-ca, --tls-cert and --tls-key are for a remote --server");
    }
    if (!options.server_key.empty()) {
      log_to(options.log, LogLevel::kWarning,
             "--server-key is not used: without --server HOST:PORT the body runs in this process");
    }
    if (auto status = endpoint.start_local(options); !status.ok()) return status;
    return endpoint;
  }
  if (options.server.find("://") != std::string::npos) {
    return absl::InvalidArgumentError(cat(
        "--server is ", options.server, "; give HOST:PORT alone, without what stands before ://"));
  }
  if (options.server_key.empty()) {
    return absl::InvalidArgumentError(
        "a remote server needs --server-key: its public key, or the .pub file of engine_keygen");
  }
  auto key = load_public_key(options.server_key);
  if (!key.ok()) return key.status();
  endpoint.link_.server_key = *key;
  if (options.identity.empty()) {
    return absl::InvalidArgumentError(
        "a remote server needs --identity: this client's secret key file; engine_keygen makes one");
  }
  auto identity = Identity::load(options.identity);
  if (!identity.ok()) return identity.status();
  endpoint.identity_ = *std::move(identity);
  endpoint.link_.spin = std::thread::hardware_concurrency() >= kCoresToSpin;
  if (!options.tls.empty()) {
    auto tls = load_client_tls(options.tls);
    if (!tls.ok()) return tls.status();
    endpoint.link_.tls = *std::move(tls);
  }
  return endpoint;
}

absl::StatusOr<std::unique_ptr<Link>> Endpoint::connect(std::stop_token stop) const {
  ClientLinkOptions options = link_;
  options.identity = &*identity_;
  return connect_link(options, stop);
}

absl::StatusOr<std::unique_ptr<Link>> Endpoint::connect_through(int port,
                                                                std::stop_token stop) const {
  ClientLinkOptions options = link_;
  options.identity = &*identity_;
  options.server = cat("127.0.0.1:", port);
  return connect_link(options, stop);
}

namespace {

EarlyLink::Result connect_now(const EndpointOptions& options, const ClientManifest& manifest,
                              const std::stop_token& stop) {
  EarlyLink::Result result;
  auto endpoint = Endpoint::open(options, manifest);
  result.endpoint_status = endpoint.status();
  if (!endpoint.ok()) return result;
  result.endpoint = *std::move(endpoint);
  auto link = result.endpoint->connect(stop);
  result.link_status = link.status();
  if (!link.ok()) return result;
  result.link = *std::move(link);
  auto session = result.link->open_session(stop);
  result.link_status = session.status();
  if (session.ok()) result.session = *session;
  return result;
}

}  // namespace

EarlyLink::EarlyLink(EndpointOptions options, ClientManifest manifest, std::stop_token stop)
    : on_stop_(stop, [this] { give_up_.request_stop(); }),
      result_(std::async(
          std::launch::async,
          [options = std::move(options), manifest = std::move(manifest),
           give_up = give_up_.get_token()] { return connect_now(options, manifest, give_up); })) {}

EarlyLink::~EarlyLink() {
  give_up_.request_stop();
}

EarlyLink::Result EarlyLink::take() {
  return result_.get();
}

}  // namespace infemeral
