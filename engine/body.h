// The transformer layers behind the server: hidden states in, normed last hidden states out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/link.h"

namespace infemeral {

struct BodyInfo {
  std::string description;             // "llama 30 layers f16": for logs and for SessionInfo
  std::uint32_t hidden_size = 0;       // H
  std::uint32_t max_context = 0;       // positions a session may hold
  std::size_t kv_bytes_per_token = 0;  // over all layers
  Fingerprint model_fingerprint{};     // all zero for a checkpoint that engine_prep did not write
  Fingerprint cloak_commitment{};
};

// The KV cache of one conversation. Wiped when destroyed.
class BodySession {
 public:
  virtual ~BodySession() = default;
  virtual std::uint32_t kv_len() const = 0;  // positions held
  virtual std::size_t kv_bytes() const = 0;  // memory held
};

struct BodyStep {
  BodySession* session = nullptr;  // made by the same Body; not owned
  std::uint32_t start_pos = 0;     // <= session->kv_len(); the cache is cut to it first
  std::uint32_t rows = 0;          // >= 1
  std::span<const float> states;   // rows x H
  Wanted wanted = Wanted::kLast;
  std::span<float> out;  // (0 | 1 | rows) x H: rms-normed and times the final gain
  absl::Status status;   // set by run()
};

// One caller at a time for run(); sessions may be made and destroyed from any thread that does not
// overlap a run() that uses them. The body must outlive its sessions.
class Body {
 public:
  virtual ~Body() = default;
  virtual const BodyInfo& info() const = 0;
  virtual absl::StatusOr<std::unique_ptr<BodySession>> new_session() = 0;
  // Runs every step (each on a different session), each with its own status: InvalidArgument for
  // positions or sizes that do not fit, ResourceExhausted when the cache cannot grow, Unavailable
  // when the body has ended and no step will run any more.
  virtual void run(std::span<BodyStep> steps) = 0;
};

}  // namespace infemeral
