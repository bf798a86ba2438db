// Sessions and steps over a ClientStream: what is asked, and whether an answer fits it.
#include "net/client_link.h"

#include <algorithm>
#include <deque>
#include <map>
#include <optional>
#include <utility>
#include <variant>

#include "absl/strings/str_cat.h"
#include "net/address.h"
#include "net/client_errors.h"
#include "net/client_stream.h"
#include "net/codec.h"
#include "net/frames.h"

namespace infemeral {
namespace {

absl::Status check_options(const ClientLinkOptions& options) {
  if (options.identity == nullptr) {
    return absl::InvalidArgumentError("a link needs the client's identity");
  }
  if (options.hidden_size < 1 || options.hidden_size > kMaxHiddenSize) {
    return absl::InvalidArgumentError(
        absl::StrCat("a link for hidden size ", options.hidden_size, " cannot be made"));
  }
  const std::size_t colon = options.server.rfind(':');
  if (colon == std::string::npos || colon == 0 || colon + 1 == options.server.size()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "the server address \"", printable(options.server), "\" is not of the form host:port"));
  }
  const std::string_view host(options.server.data(), colon);
  // In a gRPC target with a scheme, colons have other meanings.
  if (host.find_first_of("[/") == host.npos && std::count(host.begin(), host.end(), ':') > 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("the server address \"", printable(options.server),
                     "\" is not of the form host:port: an IPv6 address needs brackets, as in "
                     "[::1]:50051"));
  }
  const std::string_view port = std::string_view(options.server).substr(colon + 1);
  if (options.server.find('/') == std::string::npos && !options.server.starts_with("unix") &&
      (!is_port(port) || port == "0")) {
    return absl::InvalidArgumentError(
        absl::StrCat("the server address \"", printable(options.server),
                     "\" is not of the form host:port: a port is a number from 1 to 65535"));
  }
  if (options.force_cipher && !cipher_suite_available(*options.force_cipher)) {
    return absl::UnimplementedError(absl::StrCat("this processor has no instructions for ",
                                                 cipher_suite_name(*options.force_cipher)));
  }
  return absl::OkStatus();
}

ClientLinkOptions without_identity(ClientLinkOptions options) {
  options.identity = nullptr;  // its owner may go
  return options;
}

class ClientLink : public Link {
 public:
  explicit ClientLink(const ClientLinkOptions& options)
      : options_(without_identity(options)),
        stream_(options_, Identity::from_secret(options.identity->secret_key().copy()), counters_) {
  }

  absl::Status connect(const std::stop_token& stop) { return stream_.connect(stop); }
  absl::Status reconnect(std::stop_token stop) override;

  absl::StatusOr<SessionInfo> open_session(std::stop_token stop) override;
  absl::Status step(const StepRequest& request, std::stop_token stop, StepReply& reply,
                    PhaseTimes& times) override;
  absl::Status submit(const StepRequest& request, std::stop_token stop, PhaseTimes& times) override;
  absl::Status await(std::stop_token stop, StepReply& reply, PhaseTimes& times) override;
  void close_session(std::uint64_t session) override;
  LinkCounters counters() const override { return counters_; }
  std::string cipher() const override { return cipher_suite_name(stream_.suite()); }

 private:
  // A step whose answer has not been taken.
  struct SentStep {
    std::uint64_t request = 0;
    std::uint32_t rows_back = 0;
    std::uint32_t kv_len = 0;
    WireDtype dtype = WireDtype::kF16;
    std::size_t padded_bytes = 0;  // of the answer's frame
    std::optional<Frame> answer;
  };

  absl::Status ready(const std::stop_token& stop) const;
  // The answer to the oldest step that is out. An error has given the link up.
  absl::StatusOr<Frame> take_answer(ClientStream::Interrupt& interrupt, PhaseTimes& times);
  std::size_t answer_bytes(const SentStep& sent) const {
    return sent.rows_back * wire_row_bytes(sent.dtype, options_.hidden_size);
  }
  // The size of a frame with so many rows of a session; 0 when this link does not pad.
  std::size_t padded_bytes(std::uint32_t rows, WireDtype dtype, std::uint32_t max_rows) const {
    if (!options_.pad) return 0;
    return padded_frame_bytes(rows, wire_row_bytes(dtype, options_.hidden_size), max_rows);
  }
  std::size_t padded_bytes() const { return padded_bytes(0, WireDtype::kF32, 0); }
  absl::Status check_step(const StepRequest& request) const;

  const ClientLinkOptions options_;  // with `identity` null
  LinkCounters counters_;
  ClientStream stream_;
  std::uint64_t request_ = 0;
  // Of this connection: once the stream is given up they mean nothing, until reconnect() clears
  // them.
  std::deque<SentStep> sent_;  // oldest first
  std::map<std::uint64_t, SessionInfo> sessions_;
  bool warned_of_padding_ = false;
};

absl::Status ClientLink::reconnect(std::stop_token stop) {
  sessions_.clear();
  sent_.clear();
  if (absl::Status status = stream_.connect(stop); !status.ok()) return status;
  ++counters_.reconnects;
  return absl::OkStatus();
}

absl::Status ClientLink::ready(const std::stop_token& stop) const {
  if (!stream_.error().ok()) return stream_.error();
  if (stop.stop_requested()) return absl::CancelledError("stopped");
  return absl::OkStatus();
}

absl::StatusOr<SessionInfo> ClientLink::open_session(std::stop_token stop) {
  if (absl::Status status = ready(stop); !status.ok()) return status;
  ClientStream::Interrupt interrupt(stream_, options_.step_timeout, stop);
  PhaseTimes times;
  const std::string frame = encode_frame(
      {++request_, OpenFrame{options_.model_fingerprint, options_.cloak_commitment,
                             static_cast<std::uint32_t>(options_.hidden_size), options_.pad}},
      padded_bytes());
  if (absl::Status status = stream_.send(frame, interrupt, times); !status.ok()) return status;
  absl::StatusOr<Frame> answer = stream_.receive(kMaxFrameOverhead, interrupt, times);
  if (!answer.ok()) return answer.status();
  if (answer->request != request_) return stream_.give_up(not_asked());
  if (const auto* error = std::get_if<ErrorFrame>(&answer->kind)) return error->status;
  const auto* opened = std::get_if<OpenedFrame>(&answer->kind);
  if (opened == nullptr || opened->session.hidden_size != options_.hidden_size) {
    return stream_.give_up(
        absl::DataLossError("the server opened something that was not asked for"));
  }
  if (options_.pad && !opened->padded && !std::exchange(warned_of_padding_, true)) {
    log_to(options_.log, LogLevel::kWarning,
           absl::StrCat(options_.server,
                        " does not pad its answers: only the sizes of what is sent are hidden"));
  }
  sessions_[opened->session.id] = opened->session;
  return opened->session;
}

absl::Status ClientLink::check_step(const StepRequest& request) const {
  const auto found = sessions_.find(request.session);
  if (found == sessions_.end()) {
    return absl::NotFoundError("this link has no such session; open one");
  }
  if (request.rows < 1 || request.rows > found->second.max_rows) {
    return absl::InvalidArgumentError(absl::StrCat(
        "a step of ", request.rows, " rows; the server takes 1 to ", found->second.max_rows));
  }
  const std::uint32_t max_context = found->second.max_context;
  if (request.rows > max_context || request.start_pos > max_context - request.rows) {
    return absl::InvalidArgumentError(absl::StrCat(
        request.rows, " rows from position ", request.start_pos,
        " do not fit the server's context of ", max_context, "; shorten the prompt or the answer"));
  }
  const std::size_t expected = request.rows * wire_row_bytes(request.dtype, options_.hidden_size);
  if (request.tensor.size() != expected) {
    return absl::InvalidArgumentError(
        absl::StrCat(request.rows, " rows of ", std::string(wire_dtype_name(request.dtype)),
                     " are ", expected, " bytes, not ", request.tensor.size()));
  }
  return absl::OkStatus();
}

absl::Status ClientLink::step(const StepRequest& request, std::stop_token stop, StepReply& reply,
                              PhaseTimes& times) {
  if (absl::Status status = submit(request, stop, times); !status.ok()) return status;
  return await(stop, reply, times);
}

absl::Status ClientLink::submit(const StepRequest& request, std::stop_token stop,
                                PhaseTimes& times) {
  if (absl::Status status = ready(stop); !status.ok()) return status;
  if (absl::Status status = check_step(request); !status.ok()) return status;
  if (sent_.size() >= kMaxInFlight) {
    return absl::InvalidArgumentError("a link takes no more steps before it is asked for answers");
  }
  ClientStream::Interrupt interrupt(stream_, options_.step_timeout, stop);
  PhaseClock clock;
  PackedTensor packed = pack_tensor(request.dtype, request.tensor, request.rows);
  const std::size_t packed_up = packed.bytes.size();
  const std::uint32_t max_rows = sessions_.at(request.session).max_rows;
  const std::uint32_t rows_back = output_rows(request.wanted, request.rows);
  const std::string frame = encode_frame({++request_, StepFrame{.session = request.session,
                                                                .start_pos = request.start_pos,
                                                                .rows = request.rows,
                                                                .wanted = request.wanted,
                                                                .tensor = std::move(packed)}},
                                         padded_bytes(request.rows, request.dtype, max_rows));
  clock.lap(times.encode_ms);
  if (absl::Status status = stream_.send(frame, interrupt, times); !status.ok()) return status;
  sent_.push_back({.request = request_,
                   .rows_back = rows_back,
                   .kv_len = request.start_pos + request.rows,
                   .dtype = request.dtype,
                   .padded_bytes = padded_bytes(rows_back, request.dtype, max_rows)});
  counters_.tensor_bytes_up += request.tensor.size();
  counters_.packed_bytes_up += packed_up;
  return absl::OkStatus();
}

// Answers to steps of one session come in their order, but an error may overtake the answers to
// steps that the body still works on.
absl::StatusOr<Frame> ClientLink::take_answer(ClientStream::Interrupt& interrupt,
                                              PhaseTimes& times) {
  std::size_t most = 0;
  for (const SentStep& sent : sent_) {
    most = std::max({most, answer_bytes(sent) + kMaxFrameOverhead, sent.padded_bytes});
  }
  while (!sent_.front().answer) {
    absl::StatusOr<Frame> frame = stream_.receive(most, interrupt, times);
    if (!frame.ok()) return frame.status();
    const auto asked = std::find_if(sent_.begin(), sent_.end(), [&](const SentStep& sent) {
      return sent.request == frame->request && !sent.answer;
    });
    if (asked == sent_.end()) return stream_.give_up(not_asked());
    asked->answer = *std::move(frame);
  }
  Frame answer = *std::move(sent_.front().answer);
  return answer;
}

absl::Status ClientLink::await(std::stop_token stop, StepReply& reply, PhaseTimes& times) {
  if (!stream_.error().ok()) return stream_.error();
  if (sent_.empty()) return absl::InternalError("no step is out");
  ClientStream::Interrupt interrupt(stream_, options_.step_timeout, stop);
  const double network_before = times.network_ms;
  absl::StatusOr<Frame> answer = take_answer(interrupt, times);
  if (!answer.ok()) return answer.status();
  const SentStep sent = std::move(sent_.front());
  sent_.pop_front();
  if (const auto* error = std::get_if<ErrorFrame>(&answer->kind)) return error->status;

  PhaseClock unpack_clock;
  auto* output = std::get_if<OutputFrame>(&answer->kind);
  const bool fits = output != nullptr && output->rows == sent.rows_back &&
                    output->kv_len == sent.kv_len &&
                    (output->rows == 0 || output->tensor.dtype == sent.dtype);
  const std::size_t expected = answer_bytes(sent);
  if (!fits || !unpack_tensor(output->tensor, expected, reply.tensor).ok()) {
    return stream_.give_up(absl::DataLossError("the server's answer does not fit the step"));
  }
  reply.rows = output->rows;
  reply.kv_len = output->kv_len;
  unpack_clock.lap(times.decode_ms);
  // The body's own figure, but never more than the wait that it is part of.
  const double body_ms = std::min(output->compute_ms, times.network_ms - network_before);
  times.network_ms -= body_ms;
  times.body_ms += body_ms;

  ++counters_.steps;
  counters_.tensor_bytes_down += expected;
  counters_.packed_bytes_down += output->tensor.bytes.size();
  return absl::OkStatus();
}

void ClientLink::close_session(std::uint64_t session) {
  if (!stream_.error().ok() || sessions_.erase(session) == 0) return;
  ClientStream::Interrupt interrupt(stream_, ClientStream::kCloseTimeout, {});
  PhaseTimes times;
  // A failure gives the link up, which the next call reports.
  (void)stream_.send(encode_frame({++request_, CloseFrame{session}}, padded_bytes()), interrupt,
                     times);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Link>> connect_link(const ClientLinkOptions& options,
                                                   const std::stop_token& stop) {
  if (absl::Status status = check_options(options); !status.ok()) return status;
  auto link = std::make_unique<ClientLink>(options);
  if (absl::Status status = link->connect(stop); !status.ok()) return status;
  return std::unique_ptr<Link>(std::move(link));
}

}  // namespace infemeral
