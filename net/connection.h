// The server's end of one stream: handshake, sessions, requests and answers. Used by
// body_server.cpp only.
#pragma once

#include <grpcpp/grpcpp.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "engine/body.h"
#include "net/admission.h"
#include "net/body_server.h"
#include "net/channel.h"
#include "net/frames.h"
#include "net/scheduler.h"
#include "net/watchdog.h"
#include "proto/split_inference.pb.h"

namespace infemeral {

class Connection;

// What all connections of a server share.
struct ServerState {
  ServerState(Body& served, const BodyServerOptions& given);

  Body& body;
  const BodyServerOptions options;  // with `identity` null and `ciphers` filled in
  const Identity identity;
  const std::size_t max_frame;  // bytes of the largest frame that a client may send
  const std::shared_ptr<Admission> admission;

  std::atomic<std::uint64_t> connections = 0;
  std::atomic<std::uint64_t> handshakes = 0;
  std::atomic<std::uint64_t> refused = 0;
  std::atomic<std::uint64_t> steps = 0;

  std::mutex mutex;
  std::condition_variable changed;
  std::set<std::shared_ptr<Connection>> open;
  bool draining = false;

  // The server ends both before the last connection can: neither thread ever joins itself.
  std::unique_ptr<Watchdog> watchdog;
  std::unique_ptr<Scheduler> scheduler;
};

// gRPC calls the On* functions one after the other for reads and for writes, on its own threads;
// the scheduler delivers answers from its thread. The read side (handshake, opener, sessions) is
// touched by reads alone; the rest is behind the mutex.
class Connection : public grpc::ServerBidiReactor<v1::Envelope, v1::Envelope>,
                   public std::enable_shared_from_this<Connection> {
 public:
  Connection(std::shared_ptr<ServerState> server, std::string peer);

  // After construction, once a shared_ptr holds the connection. It keeps itself alive until OnDone.
  void begin();
  // Ends the stream when what is pending has been answered.
  void drain();

  void OnReadDone(bool ok) override;
  void OnWriteDone(bool ok) override;
  void OnCancel() override;
  void OnDone() override;

 private:
  // What the client has shown so far. The hello may be a recording of another stream's; the first
  // record that decrypts proves that the client holds its key.
  enum class Stage { kNothing, kHello, kProven };
  using SessionMap = std::map<std::uint64_t, std::shared_ptr<ServedSession>>;

  // Read side. A status ends the stream.
  grpc::Status on_hello();
  void on_proof();
  grpc::Status on_records(Stage stage);
  grpc::Status on_frame(Frame frame);
  absl::StatusOr<OpenedFrame> open_session(const OpenFrame& open);
  absl::Status submit_step(std::uint64_t request, const StepFrame& step);
  grpc::Status refuse(grpc::Status status);

  // Ends the stream unless it has come beyond `stage` within `timeout`.
  void limit_stage(Stage stage, std::chrono::milliseconds timeout, const char* missing);

  // Any thread.
  void on_step_done(std::uint64_t request, WireDtype dtype, StepJob& job);
  void answer(std::uint64_t request, decltype(Frame::kind) kind);
  void fail(grpc::Status status);

  // With the mutex held.
  void read_more();
  void write_more();
  void finish_when_ready();
  void end(grpc::Status status, bool at_once);

  const std::shared_ptr<ServerState> server_;
  const std::string peer_;

  v1::Envelope incoming_;
  std::unique_ptr<FrameOpener> opener_;  // after the handshake
  PublicKey client_{};                   // likewise
  SessionMap sessions_;
  bool opened_once_ = false;  // a session, which may be closed by now
  std::optional<Watchdog::Ticket> alarm_;

  std::mutex mutex_;
  Stage stage_ = Stage::kNothing;
  std::unique_ptr<FrameSealer> sealer_;
  std::deque<v1::Envelope> outgoing_;  // the first one is being written while writing_
  bool writing_ = false;
  bool reading_ = false;       // from StartRead until its message has been dealt with
  std::uint32_t pending_ = 0;  // requests that have no answer in outgoing_ yet
  std::optional<grpc::Status> ending_;
  bool finished_ = false;
  std::atomic<bool> gone_ = false;  // no answer can reach the client any more
};

}  // namespace infemeral
