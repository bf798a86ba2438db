#include "tools/endpoint.h"

#include "cpu/body.h"
#include "engine/text.h"

namespace infemeral {

absl::StatusOr<PublicKey> load_public_key(const std::string& text_or_file) {
  if (auto key = parse_public_key(text_or_file); key.ok()) return *key;
  auto keys = load_public_keys(text_or_file);
  if (!keys.ok()) return keys.status();
  if (keys->size() != 1) {
    return absl::InvalidArgumentError(
        cat(text_or_file, " holds ", keys->size(), " keys; exactly one is needed"));
  }
  return keys->front();
}

absl::Status Endpoint::start_local(const EndpointOptions& options) {
  auto body = load_cpu_body(options.body_folder, {.threads = options.threads});
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
                    .log = options.log};
  if (options.server == "local") {
    if (auto status = endpoint.start_local(options); !status.ok()) return status;
    return endpoint;
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
  return endpoint;
}

absl::StatusOr<std::unique_ptr<Link>> Endpoint::connect(std::stop_token stop) const {
  ClientLinkOptions options = link_;
  options.identity = &*identity_;
  return connect_link(options, stop);
}

}  // namespace infemeral
