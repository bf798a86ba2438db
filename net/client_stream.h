// The client's encrypted stream to a server: frames in and out, each call within its time. What the
// frames mean is client_link.cpp's business; the server's end is net/connection.h.
#pragma once

#include <grpcpp/grpcpp.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <functional>
#include <memory>
#include <optional>
#include <stop_token>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/metrics.h"
#include "net/channel.h"
#include "net/client_errors.h"
#include "net/client_link.h"
#include "net/frames.h"
#include "net/identity.h"
#include "net/noise.h"
#include "net/watchdog.h"
#include "proto/split_inference.grpc.pb.h"

namespace infemeral {

// Owns the channel, the gRPC call on it, both directions' ciphers and the watchdog's thread, which
// does nothing but cancel the call. One caller at a time; all calls block.
//
// Errors are those of Link. Any of them gives the stream up: error() repeats it from then on, and
// nothing but connect() may be called.
class ClientStream {
 public:
  // Cancels the stream's call when `timeout` is over or `stop` is triggered, while it lives. The
  // stream is connected, and outlives it.
  class Interrupt {
   public:
    Interrupt(ClientStream& stream, std::chrono::milliseconds timeout, const std::stop_token& stop);
    ~Interrupt();
    Interrupt(const Interrupt&) = delete;
    Interrupt& operator=(const Interrupt&) = delete;

    bool stopped() const { return stopped_; }

   private:
    std::atomic<bool> stopped_ = false;
    Watchdog& watchdog_;
    const Watchdog::Ticket ticket_;
    std::stop_callback<std::function<void()>> on_stop_;
  };

  // Both must outlive it. Of the options it reads what is about the connection, but not `identity`;
  // in `counters` it counts handshakes and bytes.
  ClientStream(const ClientLinkOptions& options, Identity identity, LinkCounters& counters);
  ~ClientStream();  // ends the stream in good order where it is up, within kCloseTimeout
  ClientStream(const ClientStream&) = delete;
  ClientStream& operator=(const ClientStream&) = delete;

  // A new connection and its handshake, in options.connect_timeout altogether; what there was is
  // given up.
  absl::Status connect(const std::stop_token& stop);

  absl::Status send(const std::string& frame, Interrupt& interrupt, PhaseTimes& times);
  // The next frame, of at most `max_frame` bytes. It must come alone: none is sent unasked.
  absl::StatusOr<Frame> receive(std::size_t max_frame, Interrupt& interrupt, PhaseTimes& times);

  // Ends the stream at once, for a fault that the caller found. Returns `status`.
  absl::Status give_up(absl::Status status);
  // OK while the stream is up.
  const absl::Status& error() const { return error_; }
  CipherSuite suite() const { return suite_; }  // of the last handshake

  // Closing is best effort: nobody waits longer for a server that does not answer.
  static constexpr std::chrono::milliseconds kCloseTimeout{1000};

 private:
  absl::Status open(const std::stop_token& stop);
  // One handshake. `offered` is what the server accepts instead, when it refused this suite.
  absl::Status shake_hands(CipherSuite suite, Interrupt& interrupt,
                           std::optional<CipherSuite>& offered);
  absl::Status check_refusal(const v1::Refusal& refusal, CipherSuite suite,
                             std::optional<CipherSuite>& offered) const;
  bool write(const v1::Envelope& envelope);
  bool read(v1::Envelope& envelope);
  bool wait();         // for the call's only operation that is out; false when it failed
  bool wait_around();  // the same, awake around the time that the last one took
  // Why the stream broke, from the interrupt or from gRPC's status.
  absl::Status broken(const Interrupt& interrupt, StreamStage stage);
  absl::Status no_answer(std::chrono::milliseconds timeout) const;
  void hang_up();
  grpc::Status finish_stream();  // waits for its end

  const ClientLinkOptions& options_;
  const Identity identity_;
  LinkCounters& counters_;
  Watchdog watchdog_;

  std::unique_ptr<v1::SplitInference::Stub> stub_;  // of this connection's own channel
  std::unique_ptr<grpc::ClientContext> context_;
  // Why an interrupt has cancelled the call. Kept with the call, as the interrupt may be gone
  // before anybody notices: when a step's time is over between its last byte and the wait for its
  // answer.
  std::atomic<bool> timed_out_ = false;
  std::atomic<bool> stopped_ = false;
  grpc::CompletionQueue queue_;
  Watchdog::Clock::duration last_wait_{};  // for an answer
  // Null once the stream is given up.
  std::unique_ptr<grpc::ClientAsyncReaderWriter<v1::Envelope, v1::Envelope>> stream_;
  absl::Status error_;  // why it was
  CipherSuite suite_ = CipherSuite::kAesGcm;
  std::unique_ptr<FrameSealer> sealer_;
  std::unique_ptr<FrameOpener> opener_;
};

}  // namespace infemeral
