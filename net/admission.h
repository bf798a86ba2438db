// Who may take how much of a server: sessions, in all and for each client, and positions in the KV
// caches. Those who are in keep what they have; whoever asks for more than is left is refused.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "net/identity.h"

namespace infemeral {

struct AdmissionLimits {
  std::uint32_t sessions = 0;             // over all clients
  std::uint32_t sessions_per_client = 0;  // over all connections of one key
  std::uint64_t positions = 0;            // over all sessions
};

class Admission;

// One session's share of the limits; gives it back when destroyed. Any thread, one at a time.
class SessionLease {
 public:
  SessionLease(std::shared_ptr<Admission> admission, const PublicKey& client);
  ~SessionLease();
  SessionLease(const SessionLease&) = delete;
  SessionLease& operator=(const SessionLease&) = delete;

  // Sets room for positions [0, end) aside. Room is kept until the session ends, as a cache keeps
  // its memory. ResourceExhausted when the server has no such room now, InvalidArgument
  // when it never has; nothing changes then.
  absl::Status reserve(std::uint32_t end);

 private:
  const std::shared_ptr<Admission> admission_;
  const PublicKey client_;
  std::uint32_t positions_ = 0;
};

// May be called from any thread.
class Admission : public std::enable_shared_from_this<Admission> {
 public:
  explicit Admission(const AdmissionLimits& limits) : limits_(limits) {}

  // ResourceExhausted when all sessions, or all of this client, are in use.
  absl::StatusOr<std::unique_ptr<SessionLease>> admit(const PublicKey& client);
  std::uint32_t sessions() const;
  std::uint64_t positions() const;  // over all sessions
  // For later sessions.
  void set_sessions_per_client(std::uint32_t limit);

 private:
  friend class SessionLease;

  mutable std::mutex mutex_;
  AdmissionLimits limits_;
  std::uint32_t sessions_ = 0;
  std::uint64_t positions_ = 0;
  std::map<PublicKey, std::uint32_t> of_client_;  // sessions; without clients that have none
};

}  // namespace infemeral
