// What engine_run talks to: a remote body server, or one that runs in this process over the same
// channel code.
#pragma once

#include <filesystem>
#include <memory>
#include <optional>
#include <stop_token>
#include <string>

#include "absl/status/statusor.h"
#include "engine/body.h"
#include "engine/client_folder.h"
#include "engine/link.h"
#include "engine/log.h"
#include "net/body_server.h"
#include "net/client_link.h"
#include "net/identity.h"

namespace infemeral {

// A public key, or a file that holds exactly one.
absl::StatusOr<PublicKey> load_public_key(const std::string& text_or_file);

struct EndpointOptions {
  std::string server = "local";       // "local" or "host:port"
  std::string server_key;             // remote: the server's public key, or a file that holds it
  std::string identity;               // remote: this client's secret key file
  std::filesystem::path body_folder;  // local
  int threads = 0;                    // local: of the body
  LogSink log;
};

// Everything up to the network. It must outlive the links that it makes.
class Endpoint {
 public:
  // All errors are this machine's: options that do not fit together, key files, the body's folder.
  static absl::StatusOr<Endpoint> open(const EndpointOptions& options,
                                       const ClientManifest& manifest);

  // The errors of connect_link.
  absl::StatusOr<std::unique_ptr<Link>> connect(std::stop_token stop) const;

  const Body* local_body() const { return body_.get(); }  // null when the server is remote

 private:
  Endpoint() = default;
  absl::Status start_local(const EndpointOptions& options);

  std::unique_ptr<Body> body_;          // local; destroyed after the server
  std::unique_ptr<BodyServer> server_;  // local
  std::optional<Identity> identity_;
  ClientLinkOptions link_;  // its identity is set by connect()
};

}  // namespace infemeral
