// What engine_run talks to: a remote body server, or one that it starts in this process over the
// same channel code.
#pragma once

#include <filesystem>
#include <memory>
#include <stop_token>
#include <string>

#include "absl/status/statusor.h"
#include "engine/body.h"
#include "engine/client_folder.h"
#include "engine/link.h"
#include "engine/log.h"
#include "net/body_server.h"

namespace infemeral {

struct ConnectionOptions {
  std::string server = "local";       // "local" or "host:port"
  std::string server_key;             // remote: the server's public key, or a file that holds it
  std::string identity;               // remote: this client's secret key file
  std::filesystem::path body_folder;  // local
  int threads = 0;                    // local: of the body
  LogSink log;
};

// Members are destroyed in the reverse of this order: the link, then the server, then the body.
struct Connection {
  std::unique_ptr<Body> body;          // local only
  std::unique_ptr<BodyServer> server;  // local only
  std::unique_ptr<Link> link;
};

// InvalidArgument for options that do not fit together; the errors of load_cpu_body and
// connect_link.
absl::StatusOr<Connection> connect(const ConnectionOptions& options, const ClientManifest& manifest,
                                   std::stop_token stop);

}  // namespace infemeral
