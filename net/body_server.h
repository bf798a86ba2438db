// Serves a Body to authenticated clients over encrypted gRPC streams.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/body.h"
#include "engine/log.h"
#include "net/identity.h"
#include "net/noise.h"
#include "net/tls.h"

namespace infemeral {

struct BodyServerOptions {
  std::string listen = "127.0.0.1:0";  // "host:port"; port 0 takes a free one
  const Identity* identity = nullptr;  // read by start() only
  std::vector<PublicKey> allow;        // the only clients that get a session; see set_allow()
  std::uint32_t max_sessions = 64;     // over all connections
  // Over all connections of one client. 0: half of max_sessions, or all when one client is allowed.
  std::uint32_t max_sessions_per_client = 0;
  // BodyInfo::kv_bytes_per_token times the positions that all sessions hold; 0 is no limit. The
  // step that would go beyond is refused. A body may round a session up to whole pages.
  std::uint64_t max_kv_bytes = 0;
  std::uint32_t max_rows_per_step = 512;
  // Steps of a session that wait behind each other are joined to runs of at most so many rows. More
  // do not make a CPU faster, and the others' steps wait for a run.
  std::uint32_t joined_rows = 128;
  // A lone decode step that takes less than this runs on the thread of gRPC's that brought it,
  // which it holds meanwhile: another thread is awake after 10 to 50 us, or, where processors go to
  // sleep, after 100. For longer steps of a body that leaves the processors alone.
  std::chrono::microseconds quick_run{500};
  std::uint32_t max_pending_per_connection = 16;      // requests read but not yet answered
  std::chrono::milliseconds handshake_timeout{5000};  // until the hello
  // From the handshake to the client's first frame. The hello can be somebody's recording; only
  // the first frame proves that the client holds its key.
  std::chrono::milliseconds first_frame_timeout{60000};
  // Accepted suites; empty means all that this processor has.
  std::vector<CipherSuite> ciphers;
  RekeyLimits rekey;          // of what the server sends
  std::optional<TlsPem> tls;  // else the streams run over plain TCP
  LogSink log;
};

// Upper ends of the buckets of step latencies, in seconds.
inline constexpr std::array<double, 13> kStepLatencyBounds = {
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10};

// How long steps took from their frame to their answer, waiting included.
struct StepLatency {
  std::array<std::uint64_t, kStepLatencyBounds.size() + 1> counts{};  // the last: longer than all
  double sum_seconds = 0;
};

struct BodyServerCounters {
  std::uint64_t connections = 0;       // streams accepted so far
  std::uint64_t handshakes = 0;        // of these, allowed and proven by a first frame
  std::uint64_t refused = 0;           // of these, turned away before that
  std::uint64_t steps = 0;             // run by the body
  std::uint64_t failed_steps = 0;      // of these, without a result
  std::uint64_t refused_sessions = 0;  // asked for and not given
  std::uint64_t refused_steps = 0;     // not run: a limit, or something wrong with them
  StepLatency step_latency;            // of the steps run
  std::uint32_t open_connections = 0;
  std::uint32_t open_sessions = 0;
  std::uint64_t kv_bytes = 0;       // of the positions that open sessions hold
  std::uint32_t waiting_steps = 0;  // queued behind the run in progress
};

// Body::run() is called by one thread of the server's own, or, for a lone step of a quick body, by
// the one of gRPC's that has read it; never by two at a time. Everything else happens on gRPC's
// threads, so that an idle connection costs no thread. All public functions may be called from any
// thread.
class BodyServer {
 public:
  // The body is borrowed: it must outlive the server. InvalidArgument for bad options, Unavailable
  // when the address cannot be listened on.
  static absl::StatusOr<std::unique_ptr<BodyServer>> start(Body& body, BodyServerOptions options);

  virtual ~BodyServer() = default;  // as shutdown(0)

  virtual int port() const = 0;
  virtual BodyServerCounters counters() const = 0;

  // Replaces the list of clients. Connections that are open go on, also of clients that are not on
  // the list any more; they cannot connect again. InvalidArgument for an empty list, which changes
  // nothing.
  virtual absl::Status set_allow(std::vector<PublicKey> allow) = 0;

  // Takes no new connections or sessions, reports NOT_SERVING to health checks, ends idle
  // connections at once and the others when their pending steps are answered, or after `grace`.
  // Returns when everything has ended. Further calls do nothing.
  virtual void shutdown(std::chrono::milliseconds grace) = 0;
};

}  // namespace infemeral
