#include "net/server_state.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "net/bytes.h"
#include "net/channel.h"
#include "net/frames.h"

namespace infemeral {
namespace {

BodyServerOptions fixed_part(BodyServerOptions options) {
  options.identity = nullptr;  // its owner may go
  options.allow.clear();
  return options;
}

std::uint32_t sessions_per_client(const BodyServerOptions& options,
                                  const std::vector<PublicKey>& allow) {
  if (options.max_sessions_per_client > 0) return options.max_sessions_per_client;
  const bool one = std::set<PublicKey>(allow.begin(), allow.end()).size() == 1;
  return one ? options.max_sessions : std::max(1u, options.max_sessions / 2);
}

AdmissionLimits admission_limits(const BodyServerOptions& options, const BodyInfo& info) {
  AdmissionLimits limits{.sessions = options.max_sessions,
                         .sessions_per_client = sessions_per_client(options, options.allow),
                         .positions = std::numeric_limits<std::uint64_t>::max()};
  if (options.max_kv_bytes > 0) limits.positions = options.max_kv_bytes / info.kv_bytes_per_token;
  return limits;
}

}  // namespace

ServerState::ServerState(Body& served, const BodyServerOptions& given,
                         std::unique_ptr<StepQueue> queue)
    : body(served),
      options(fixed_part(given)),
      identity(Identity::from_secret(given.identity->secret_key().copy())),
      max_frame(max_frame_bytes(given.max_rows_per_step, served.info().hidden_size)),
      admission(std::make_shared<Admission>(admission_limits(given, served.info()))),
      allow(given.allow),
      watchdog(std::make_unique<Watchdog>()),
      scheduler(std::move(queue)) {}

bool ServerState::allows(const PublicKey& client) {
  const std::lock_guard lock(mutex);
  return contains_key(allow, client);
}

void ServerState::set_allow(std::vector<PublicKey> clients) {
  admission->set_sessions_per_client(sessions_per_client(options, clients));
  const std::lock_guard lock(mutex);
  allow = std::move(clients);
}

absl::StatusOr<NoiseTransport> ServerState::shake_hands(CipherSuite suite,
                                                        const std::string& message1,
                                                        std::string& message2) {
  const std::string prologue = noise_prologue(kProtocolVersion, suite);
  absl::StatusOr<NoiseHandshake> handshake =
      NoiseHandshake::responder(suite, bytes_of(prologue), identity);
  if (!handshake.ok()) return handshake.status();
  std::string payload;
  if (message1.size() != kNoiseMessage1Size ||
      !handshake->read_message(bytes_of(message1), payload).ok()) {
    return absl::UnauthenticatedError("the handshake was not made for this server's key");
  }
  if (!allows(handshake->remote_static())) {
    return absl::PermissionDeniedError("the client's key is not on this server's list");
  }
  if (absl::Status status = handshake->write_message({}, message2); !status.ok()) return status;
  return handshake->split();
}

}  // namespace infemeral
