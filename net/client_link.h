// The client's end of the encrypted stream: a Link to a BodyServer.
#pragma once

#include <chrono>
#include <cstddef>
#include <memory>
#include <optional>
#include <stop_token>
#include <string>

#include "absl/status/statusor.h"
#include "engine/link.h"
#include "engine/log.h"
#include "net/identity.h"
#include "net/noise.h"
#include "net/tls.h"

namespace infemeral {

struct ClientLinkOptions {
  std::string server;                  // "host:port", "[v6]:port" or a gRPC target with a scheme
  PublicKey server_key{};              // pinned: any other server is refused
  const Identity* identity = nullptr;  // this client; read by connect_link() only
  Fingerprint model_fingerprint{};     // what the body must have been prepared as
  Fingerprint cloak_commitment{};
  std::size_t hidden_size = 0;                      // H of the rows that steps carry
  std::chrono::milliseconds connect_timeout{5000};  // name, TCP and handshake together
  std::chrono::milliseconds step_timeout{120000};   // one step or open_session()
  std::optional<CipherSuite> force_cipher;          // else AES-GCM where both ends have it
  std::optional<TlsPem> tls;                        // else the stream runs over plain TCP
  // Rounds the sizes of frames up, in both directions where the server can (docs/protocol.md).
  bool pad = false;
  // Around the time at which an answer is due, look for it instead of sleeping: a thread that
  // sleeps is awake 10 to 100 us late. That is a core for up to a quarter of the wait, so it is for
  // machines that have one to spare.
  bool spin = false;
  RekeyLimits rekey;  // of what this end sends
  LogSink log;
};

// Connects and completes the handshake; the fingerprints are checked by open_session(), which must
// follow within a minute: the server then ends a connection that has sent nothing. Errors are those
// of Link. The first error that is not about one request's contents gives the connection up, and
// the link repeats that error until it is told to reconnect(). A stop token that is triggered in
// the middle of a call gives it up too: that call returns Cancelled, all later ones Unavailable.
absl::StatusOr<std::unique_ptr<Link>> connect_link(const ClientLinkOptions& options,
                                                   const std::stop_token& stop = {});

}  // namespace infemeral
