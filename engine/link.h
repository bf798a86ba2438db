// The pipeline's view of the body: sessions that take cloaked rows and give back hidden states.
// net/ implements it over an encrypted gRPC stream; tests implement it in memory.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <span>
#include <stop_token>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/metrics.h"
#include "engine/wire.h"

namespace infemeral {

// Which rows of a step's output come back.
enum class Wanted : std::uint8_t {
  kNone = 0,
  kLast = 1,
  kAll = 2
};  // on the wire: do not renumber

// Rows that come back from a step of `rows`: 0, 1 or all.
inline std::uint32_t output_rows(Wanted wanted, std::uint32_t rows) {
  switch (wanted) {
    case Wanted::kNone:
      return 0;
    case Wanted::kLast:
      return 1;
    case Wanted::kAll:
      return rows;
  }
  return 0;
}

using Fingerprint = std::array<std::uint8_t, 32>;  // BLAKE2b-256

struct SessionInfo {
  std::uint64_t id = 0;
  std::uint32_t hidden_size = 0;
  std::uint32_t max_context = 0;  // positions that the body's KV cache can hold
  std::uint32_t max_rows = 0;     // rows that one step may carry
  std::string body;               // what the server says it runs, for logs: "llama 30 layers f16"
};

// Rows [start_pos, start_pos + rows) of a session. A step is idempotent: the body cuts the
// session's KV cache to start_pos and appends, so sending it again changes nothing.
struct StepRequest {
  std::uint64_t session = 0;
  std::uint32_t start_pos = 0;
  std::uint32_t rows = 0;
  WireDtype dtype = WireDtype::kF16;  // of `tensor`, and of the reply
  std::span<const std::byte> tensor;  // rows * wire_row_bytes(dtype, H), cloaked
  Wanted wanted = Wanted::kLast;
};

struct StepReply {
  std::uint32_t rows = 0;         // output_rows(request.wanted, request.rows)
  std::vector<std::byte> tensor;  // rows * wire_row_bytes(request.dtype, H), normed, still cloaked
  std::uint32_t kv_len = 0;       // positions in the session's cache after the step
};

// One caller at a time. Errors carry a sentence that a user can act on:
//   Unavailable         the server cannot be reached, or went away; or an earlier call was
//   cancelled
//                       in the middle, which gives the connection up
//   DeadlineExceeded    no answer in time; the connection is given up
//   Unauthenticated     the server does not hold the pinned key
//   PermissionDenied    the server does not know this client's key
//   FailedPrecondition  client and body were not prepared together, or versions do not fit
//   NotFound            the server no longer has the session
//   ResourceExhausted   a limit of the server
//   InvalidArgument     the server refused the request's contents
//   Cancelled           the stop token was triggered
//   DataLoss            an answer was damaged or does not fit the question
//   Internal            the body failed
// InvalidArgument, NotFound, ResourceExhausted and Internal are about one request alone: a link
// that has ended never answers with them.
class Link {
 public:
  virtual ~Link() = default;

  virtual absl::StatusOr<SessionInfo> open_session(std::stop_token stop) = 0;
  // Adds to encode, encrypt, network, body, decrypt and decode.
  virtual absl::Status step(const StepRequest& request, std::stop_token stop, StepReply& reply,
                            PhaseTimes& times) = 0;

  // A step in two halves, so that the next one can be made and sent meanwhile: submit() sends, and
  // the tensor is free when it returns; await() takes the answer, or the error, of the oldest step
  // that is out. At most kMaxInFlight are out at a time, over all sessions: as many as a server
  // reads before it waits for its answers to be taken. Every one that submit() took is awaited
  // before step() or open_session() is called, also after an error; a link that has ended answers
  // at once. A link that cannot do this runs the whole step in submit().
  static constexpr std::uint32_t kMaxInFlight = 16;
  virtual absl::Status submit(const StepRequest& request, std::stop_token stop, PhaseTimes& times);
  virtual absl::Status await(std::stop_token stop, StepReply& reply, PhaseTimes& times);

  // Connects anew, whatever state the link is in; all its sessions are gone, and no step is out.
  // Errors are those of the first connection, and the link then stays broken. Unimplemented when
  // this link cannot.
  virtual absl::Status reconnect(std::stop_token stop);

  // Best effort; the server also forgets a session when its connection ends.
  virtual void close_session(std::uint64_t session) = 0;

  virtual LinkCounters counters() const = 0;
  // "Noise_IK_25519_AESGCM_SHA256" or the ChaChaPoly one.
  virtual std::string cipher() const = 0;

 private:
  std::deque<StepReply> answered_;  // of a link that runs whole steps in submit()
};

}  // namespace infemeral
