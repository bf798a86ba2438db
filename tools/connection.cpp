#include "tools/connection.h"

#include "cpu/body.h"
#include "engine/text.h"
#include "net/client_link.h"
#include "net/identity.h"

namespace infemeral {
namespace {

ClientLinkOptions link_options(const ClientManifest& manifest, const LogSink& log) {
  return {.model_fingerprint = manifest.model_fingerprint,
          .cloak_commitment = manifest.cloak_commitment,
          .hidden_size = manifest.hidden_size,
          .log = log};
}

absl::StatusOr<Connection> connect_local(const ConnectionOptions& options,
                                         const ClientManifest& manifest, std::stop_token stop) {
  Connection connection;
  auto body = load_cpu_body(options.body_folder, {.threads = options.threads});
  if (!body.ok()) return body.status();
  connection.body = *std::move(body);

  // Both ends live in this process: keys that nobody else ever sees.
  const Identity server_identity = Identity::generate();
  const Identity client_identity = Identity::generate();
  auto server = BodyServer::start(
      *connection.body, {.identity = &server_identity, .allow = {client_identity.public_key()}});
  if (!server.ok()) return server.status();
  connection.server = *std::move(server);

  ClientLinkOptions link = link_options(manifest, options.log);
  link.server = cat("127.0.0.1:", connection.server->port());
  link.server_key = server_identity.public_key();
  link.identity = &client_identity;
  auto connected = connect_link(link, stop);
  if (!connected.ok()) return connected.status();
  connection.link = *std::move(connected);
  return connection;
}

absl::StatusOr<PublicKey> server_key(const std::string& text_or_file) {
  if (text_or_file.empty()) {
    return absl::InvalidArgumentError(
        "a remote server needs --server-key: its public key, or the .pub file of engine_keygen");
  }
  if (auto key = parse_public_key(text_or_file); key.ok()) return *key;
  auto keys = load_public_keys(text_or_file);
  if (!keys.ok()) return keys.status();
  if (keys->size() != 1) {
    return absl::InvalidArgumentError(
        cat(text_or_file, " holds ", keys->size(), " keys; --server-key needs exactly one"));
  }
  return keys->front();
}

}  // namespace

absl::StatusOr<Connection> connect(const ConnectionOptions& options, const ClientManifest& manifest,
                                   std::stop_token stop) {
  if (options.server == "local") return connect_local(options, manifest, stop);

  auto key = server_key(options.server_key);
  if (!key.ok()) return key.status();
  if (options.identity.empty()) {
    return absl::InvalidArgumentError(
        "a remote server needs --identity: this client's secret key file; engine_keygen makes one");
  }
  auto identity = Identity::load(options.identity);
  if (!identity.ok()) return identity.status();

  ClientLinkOptions link = link_options(manifest, options.log);
  link.server = options.server;
  link.server_key = *key;
  link.identity = &*identity;
  auto connected = connect_link(link, stop);
  if (!connected.ok()) return connected.status();
  Connection connection;
  connection.link = *std::move(connected);
  return connection;
}

}  // namespace infemeral
