// What all connections of a body server share.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/body.h"
#include "net/admission.h"
#include "net/body_server.h"
#include "net/identity.h"
#include "net/noise.h"
#include "net/scheduler.h"
#include "net/watchdog.h"

namespace infemeral {

class Connection;

struct ServerState {
  // The body is borrowed; `queue` takes the steps for it.
  ServerState(Body& served, const BodyServerOptions& given, std::unique_ptr<StepQueue> queue);
  virtual ~ServerState() = default;

  bool allows(const PublicKey& client);
  void set_allow(std::vector<PublicKey> clients);

  // The server's part of the handshake: reads message 1, asks whether its key is allowed and
  // appends message 2. A status refuses the client. Virtual for a fuzzer, which cannot afford the
  // scalar multiplications.
  virtual absl::StatusOr<NoiseTransport> shake_hands(CipherSuite suite, const std::string& message1,
                                                     std::string& message2);

  Body& body;
  const BodyServerOptions options;  // with `identity` null, `allow` empty and `ciphers` filled in
  const Identity identity;
  const std::size_t max_frame;  // bytes of the largest frame that a client may send
  const std::shared_ptr<Admission> admission;

  std::atomic<std::uint64_t> connections = 0;
  std::atomic<std::uint64_t> handshakes = 0;
  std::atomic<std::uint64_t> refused = 0;
  std::atomic<std::uint64_t> steps = 0;
  std::atomic<std::uint64_t> failed_steps = 0;
  std::atomic<std::uint64_t> refused_sessions = 0;
  std::atomic<std::uint64_t> refused_steps = 0;

  std::mutex latency_mutex;
  StepLatency step_latency;

  std::mutex mutex;
  std::vector<PublicKey> allow;
  std::condition_variable changed;
  std::set<std::shared_ptr<Connection>> open;
  bool draining = false;

  // The server ends both before the last connection can: neither thread ever joins itself.
  std::unique_ptr<Watchdog> watchdog;
  std::unique_ptr<StepQueue> scheduler;
};

}  // namespace infemeral
