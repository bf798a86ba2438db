// A body whose layers run in another process, the worker: tools/serve_torch --front, which starts
// engine_serve with a socket between them. The rows are in memory that both have mapped.
//
// The socket is one end of a SOCK_SEQPACKET pair, and numbers have this machine's byte order. First
//
//   worker -> server   WorkerHello, and behind it the body's description
//   server -> worker   WorkerSetup, with a descriptor of the shared area
//
// and from then on WorkerMessages:
//
//   server -> worker   kRun      `count` steps are in the area; `number` is the run's
//   worker -> server   kRan      their results are there; `count` and `number` as in kRun
//   server -> worker   kRelease  session `number` has ended; there is no answer
//
// A session begins, empty, with the first step that names it. The area, for R rows of H numbers:
//
//   WorkerStep    steps[R]      the server's
//   WorkerResult  results[R]    the worker's, for the steps one by one
//   float         states[R][H]  the server's: the steps' rows, one step behind the other
//   float         out[R][H]     the worker's: a step's 0, 1 or all rows begin where its states do
//
// Each of the four begins at a multiple of 64 bytes. `tools/serve_torch/front.py` is the other end.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/body.h"

namespace infemeral {

inline constexpr std::uint32_t kWorkerMagic = 0x57464e49;  // "INFW"
// Changes with anything that is drawn here.
inline constexpr std::uint32_t kWorkerVersion = 2;

struct WorkerHello {
  std::uint32_t magic = kWorkerMagic;
  std::uint32_t version = kWorkerVersion;
  std::uint32_t hidden_size = 0;
  std::uint32_t max_context = 0;
  std::uint64_t kv_bytes_per_token = 0;
  Fingerprint model_fingerprint{};
  Fingerprint cloak_commitment{};
  // 1: the layers run on a device that leaves this machine's processors alone, so that one of them
  // may be kept busy with waiting while sessions decode.
  std::uint32_t spares_processors = 0;
  std::uint32_t unused = 0;
};
static_assert(sizeof(WorkerHello) == 96);

struct WorkerSetup {
  std::uint32_t magic = kWorkerMagic;
  std::uint32_t version = kWorkerVersion;
  std::uint32_t max_rows = 0;  // R
  std::uint32_t unused = 0;
  std::uint64_t area_bytes = 0;
};
static_assert(sizeof(WorkerSetup) == 24);

struct WorkerMessage {
  enum Kind : std::uint32_t { kRun = 1, kRan = 2, kRelease = 3 };

  std::uint32_t kind = 0;
  std::uint32_t count = 0;
  std::uint64_t number = 0;
};
static_assert(sizeof(WorkerMessage) == 16);

struct WorkerStep {
  std::uint64_t session = 0;
  std::uint32_t start_pos = 0;
  std::uint32_t rows = 0;
  std::uint32_t wanted = 0;
  std::uint32_t unused = 0;
};
static_assert(sizeof(WorkerStep) == 24);

struct WorkerResult {
  std::uint32_t code = 0;    // 0, or that of an Error in docs/protocol.md
  std::uint32_t kv_len = 0;  // positions that the session holds now
  char message[248] = {};    // of an error, filled with zeros
};
static_assert(sizeof(WorkerResult) == 256);

// Where the parts of an area are, in bytes from its start.
struct WorkerLayout {
  WorkerLayout(std::size_t max_rows, std::size_t hidden_size);

  std::size_t results, states, out, size;  // `steps` is at 0
};

struct WorkerOptions {
  // Of the steps that the worker is given at a time; more are given one after another.
  std::uint32_t max_rows = 512;
  // Called once, by any thread, when the worker has ended or has answered what makes no sense; the
  // status is for the operator. Every run() is Unavailable from then on.
  std::function<void(const absl::Status& status)> on_end;
};

// Takes the descriptor, unless it is no such socket (InvalidArgument), and waits for the worker's
// hello: FailedPrecondition for a worker of another version; DataLoss for a hello that makes
// no sense; Unavailable when it does not come.
absl::StatusOr<std::unique_ptr<Body>> open_worker_body(int descriptor, WorkerOptions options);

}  // namespace infemeral
