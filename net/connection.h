// The server's end of one stream: handshake, sessions, requests and answers. body_server.cpp puts
// it on gRPC.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "net/channel.h"
#include "net/frames.h"
#include "net/noise.h"
#include "net/scheduler.h"
#include "net/server_state.h"
#include "net/watchdog.h"
#include "proto/split_inference.pb.h"

namespace infemeral {

// The stream under a connection. A read or write is under way from its start to the connection's
// on_read_done() or on_write_done(), one of each at most. All three may be called with the
// connection's mutex held: they do not call back before they return.
class EnvelopeStream {
 public:
  virtual ~EnvelopeStream() = default;
  // The envelope stays where it is until the read is done.
  virtual void start_read(v1::Envelope& envelope) = 0;
  virtual void start_write(const v1::Envelope& envelope) = 0;
  // Once, and not while a write is under way. A read that is under way fails; then, and not before
  // this, comes on_done().
  virtual void finish(const absl::Status& status) = 0;
};

// A state machine without I/O. The stream calls the on_* functions, one after the other for reads
// and for writes, on any threads; the scheduler delivers answers from its own
// thread or from within submit(). The read side
// (handshake, opener, sessions) is touched by reads alone; the rest is behind the mutex.
class Connection : public std::enable_shared_from_this<Connection> {
 public:
  // The stream must live until on_done() has returned; it is not used afterwards.
  Connection(std::shared_ptr<ServerState> server, EnvelopeStream& stream, std::string peer);

  // After construction, once a shared_ptr holds the connection.
  void begin();
  // Ends the stream when what is pending has been answered.
  void drain();

  void on_read_done(bool ok);
  void on_write_done(bool ok);
  // The client is gone. What is under way ends with ok = false.
  void on_cancel();
  // The last call; the connection has left the server's list when it returns.
  void on_done();

 private:
  // What the client has shown so far. The hello may be a recording of another stream's; the first
  // record that decrypts proves that the client holds its key.
  enum class Stage { kNothing, kHello, kProven };
  using Clock = std::chrono::steady_clock;
  using SessionMap = std::map<std::uint64_t, std::shared_ptr<ServedSession>>;

  // Read side. A status ends the stream.
  absl::Status on_hello();
  void send_refusal();
  void on_proof();
  absl::Status on_records(Stage stage);
  absl::Status on_frame(Frame frame);
  absl::StatusOr<OpenedFrame> open_session(const OpenFrame& open);
  absl::Status submit_step(std::uint64_t request, const StepFrame& step);
  absl::Status refuse(absl::Status status);

  // Ends the stream unless it has come beyond `stage` within `timeout`.
  void limit_stage(Stage stage, std::chrono::milliseconds timeout, const char* missing);

  // Any thread.
  void on_step_done(std::uint64_t request, WireDtype dtype, Clock::time_point received,
                    const StepJob& job);
  decltype(Frame::kind) result_frame(WireDtype dtype, const StepJob& job) const;
  // The size, when it is padded, of an answer to a step that asked for so many rows.
  std::size_t padded_bytes(WireDtype dtype, std::uint32_t rows_back) const;
  void answer(std::uint64_t request, decltype(Frame::kind) kind, std::size_t padded_bytes);
  void fail(absl::Status status);

  // With the mutex held.
  void read_more();
  // What may be written now, and has to be; nobody else writes until on_write_done().
  const v1::Envelope* next_to_write();
  void write_more();
  void finish_when_ready();
  void end(absl::Status status, bool at_once);

  const std::shared_ptr<ServerState> server_;
  EnvelopeStream& stream_;
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
  bool reading_ = false;           // from start_read() until its message has been dealt with
  std::uint32_t pending_ = 0;      // requests that have no answer in outgoing_ yet
  std::atomic<bool> pad_ = false;  // answers, as the client asked
  std::optional<absl::Status> ending_;
  bool finished_ = false;
  std::atomic<bool> gone_ = false;  // no answer can reach the client any more
};

}  // namespace infemeral
