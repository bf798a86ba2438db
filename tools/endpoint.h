// What engine_run talks to: a remote body server, or one that runs in this process over the same
// channel code.
#pragma once

#include <chrono>
#include <filesystem>
#include <functional>
#include <future>
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
#include "net/tls.h"

namespace infemeral {

// A public key, or a file that holds exactly one.
absl::StatusOr<PublicKey> load_public_key(const std::string& text_or_file);

struct EndpointOptions {
  std::string server = "local";       // "local" or "host:port"
  std::string server_key;             // remote: the server's public key, or a file that holds it
  std::string identity;               // remote: this client's secret key file
  TlsFiles tls;                       // remote: where the server speaks TLS
  bool pad = false;                   // see ClientLinkOptions, as the next two
  std::filesystem::path body_folder;  // local
  int threads = 0;                    // local: of the body
  std::chrono::milliseconds connect_timeout{5000};
  std::chrono::milliseconds step_timeout{120000};
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
  // The same through a relay that listens on a port of this machine.
  absl::StatusOr<std::unique_ptr<Link>> connect_through(int port, std::stop_token stop) const;

  int local_port() const { return server_ ? server_->port() : 0; }  // 0 when the server is remote
  const Body* local_body() const { return body_.get(); }  // null when the server is remote

 private:
  Endpoint() = default;
  absl::Status start_local(const EndpointOptions& options);

  std::unique_ptr<Body> body_;          // local; destroyed after the server
  std::unique_ptr<BodyServer> server_;  // local
  std::optional<Identity> identity_;
  ClientLinkOptions link_;  // its identity is set by connect()
};

// A link and its first session, made on a thread of its own while the caller loads the model.
class EarlyLink {
 public:
  EarlyLink(EndpointOptions options, ClientManifest manifest, std::stop_token stop);
  ~EarlyLink();  // gives up what is not finished
  EarlyLink(const EarlyLink&) = delete;
  EarlyLink& operator=(const EarlyLink&) = delete;

  struct Result {
    absl::Status endpoint_status;  // of Endpoint::open
    absl::Status link_status;      // of Endpoint::connect and Link::open_session
    // Unless there was an error; destroyed in reverse order.
    std::optional<Endpoint> endpoint;
    std::unique_ptr<Link> link;
    SessionInfo session;
  };
  Result take();  // waits; once

 private:
  std::stop_source give_up_;
  const std::stop_callback<std::function<void()>> on_stop_;
  std::future<Result> result_;
};

}  // namespace infemeral
