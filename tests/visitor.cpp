#include "tests/visitor.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <stdexcept>

#include "engine/text.h"

namespace infemeral {
namespace {

using std::chrono::milliseconds;
using namespace std::string_literals;

// HTTP/2 (RFC 9113): a frame is 3 bytes of length, type, flags, 4 bytes of stream, and its payload.
constexpr std::size_t kFrameHeader = 9;
const std::string kPreface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const std::string kSettings = "\0\0\0\4\0\0\0\0\0"s;
const std::string kSettingsAck = "\0\0\0\4\1\0\0\0\0"s;
constexpr char kSettingsType = 4, kPingType = 6, kAck = 1;

// HEADERS that open stream 1, in HPACK (RFC 7541) without compression: POST, http, path, authority,
// content-type (name 31 of the static table), te.
std::string stream_headers() {
  const auto text = [](const std::string& s) { return std::string(1, char(s.size())) + s; };
  const std::string block = "\x83\x86\x04"s + text("/infemeral.v1.SplitInference/Session") +
                            "\x01"s + text("127.0.0.1") + "\x0f\x10"s + text("application/grpc") +
                            "\0"s + text("te") + text("trailers");
  return "\0\0"s + char(block.size()) + "\1\4\0\0\0\1"s + block;
}

// A step of `rows` arbitrary rows.
absl::Status step(Link& link, const SessionInfo& session, std::uint32_t start_pos,
                  std::uint32_t rows, bool wait) {
  const std::size_t row_bytes = wire_row_bytes(WireDtype::kF16, session.hidden_size);
  std::vector<std::byte> tensor(rows * row_bytes);
  const std::vector<float> row(session.hidden_size, 0.5f);
  for (std::size_t i = 0; i < rows; ++i) {
    encode_wire_row(WireDtype::kF16, row, tensor.data() + i * row_bytes);
  }
  const StepRequest request{.session = session.id,
                            .start_pos = start_pos,
                            .rows = rows,
                            .tensor = tensor,
                            .wanted = Wanted::kAll};
  PhaseTimes times;
  StepReply reply;
  if (!wait) return link.submit(request, {}, times);
  absl::Status status = link.step(request, {}, reply, times);
  if (status.ok() && (reply.rows != rows || reply.kv_len != start_pos + rows)) {
    throw std::runtime_error("a visitor's step was answered with something else");
  }
  return status;
}

ClientLinkOptions through(const Line& line, ClientLinkOptions options) {
  options.server = cat("127.0.0.1:", line.port());
  options.connect_timeout = milliseconds(10000);
  return options;
}

}  // namespace

// ---- visitors ----

Visitor::Visitor(const Deployment& deployment, int port, std::size_t client)
    : line_({.target = port}), options_(through(line_, deployment.link_options(port, client))) {
  const absl::Status status = converse(Way::kInOrder);
  if (!status.ok()) throw std::runtime_error(status.ToString());
  conversation_bytes_ = line_.bytes_up() + line_.bytes_down();
}

absl::Status Visitor::converse(Way way) {
  auto link = connect_link(options_);
  if (!link.ok()) return link.status();
  const auto session = (*link)->open_session({});
  if (!session.ok()) return session.status();
  std::uint32_t at = 0;
  for (const std::uint32_t rows : {8u, 1u, 1u}) {
    if (absl::Status status = step(**link, *session, at, rows, true); !status.ok()) return status;
    at += rows;
  }
  if (way == Way::kMidStep) return step(**link, *session, at, 64, false);
  if (way != Way::kWithoutClose) (*link)->close_session(session->id);
  return absl::OkStatus();
}

void Visitor::visit() {
  constexpr std::array<Way, 8> kWays = {Way::kInOrder, Way::kInOrder, Way::kWithoutClose,
                                        Way::kMidStep, Way::kCut,     Way::kCut,
                                        Way::kCut,     Way::kCut};
  const Way way = kWays[random_() % kWays.size()];
  ++visits_;
  if (way == Way::kMidStep) ++mid_step_;
  if (way == Way::kCut) {
    ++cuts_;
    line_.cut_next_after(random_() % (conversation_bytes_ + 1), random_() % 2 == 0);
  }
  // A channel whose connection was cut before it was one makes another, which is not cut.
  const absl::Status status = converse(way);
  if (!status.ok() && way != Way::kCut) {
    throw std::runtime_error(cat("a visitor was turned away: ", status.ToString()));
  }
}

// ---- half-open connections ----

HalfOpenCrowd::HalfOpenCrowd(int port, std::size_t size) : port_(port), peers_(size) {
  for (std::size_t i = 0; i < size; ++i) {
    peers_[i].stage = static_cast<Stage>(i % 4);
    connect(peers_[i]);
  }
}

HalfOpenCrowd::~HalfOpenCrowd() {
  for (Peer& peer : peers_) {
    if (peer.fd >= 0) ::close(peer.fd);
  }
}

void HalfOpenCrowd::connect(Peer& peer) {
  if (peer.fd >= 0) ::close(peer.fd);
  peer.unread.clear();
  peer.fd = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<std::uint16_t>(port_));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (peer.fd < 0 ||
      ::connect(peer.fd, reinterpret_cast<sockaddr*>(&address), sizeof address) != 0) {
    throw std::runtime_error("a TCP connection to the server cannot be made");
  }
  ::fcntl(peer.fd, F_SETFL, O_NONBLOCK);
  std::string hello;
  if (peer.stage != Stage::kTcp) hello = kPreface + kSettings;
  if (peer.stage == Stage::kStream) hello += stream_headers();
  (void)!::send(peer.fd, hello.data(), hello.size(), MSG_NOSIGNAL);
}

bool HalfOpenCrowd::take(Peer& peer) {
  std::array<char, 4096> buffer{};
  const ssize_t got = ::read(peer.fd, buffer.data(), buffer.size());
  if (got < 0) return errno == EAGAIN || errno == EINTR;
  if (got == 0) return false;
  if (peer.stage == Stage::kTcp) return true;
  peer.unread.append(buffer.data(), static_cast<std::size_t>(got));
  while (peer.unread.size() >= kFrameHeader) {
    const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(peer.unread[i]); };
    const std::size_t size = std::size_t{byte(0)} << 16 | std::size_t{byte(1)} << 8 | byte(2);
    if (peer.unread.size() < kFrameHeader + size) break;
    std::string frame = peer.unread.substr(0, kFrameHeader + size);
    peer.unread.erase(0, frame.size());
    if ((frame[4] & kAck) != 0) continue;
    std::string answer;
    if (frame[3] == kSettingsType) answer = kSettingsAck;
    if (frame[3] == kPingType && peer.stage != Stage::kHttp2) {
      frame[4] = kAck;
      answer = frame;
    }
    (void)!::send(peer.fd, answer.data(), answer.size(), MSG_NOSIGNAL);
  }
  return true;
}

void HalfOpenCrowd::keep_up(milliseconds timeout) {
  std::vector<pollfd> polls;
  for (const Peer& peer : peers_) polls.push_back({peer.fd, POLLIN, 0});
  if (::poll(polls.data(), polls.size(), static_cast<int>(timeout.count())) <= 0) return;
  for (std::size_t i = 0; i < peers_.size(); ++i) {
    if (polls[i].revents == 0 || take(peers_[i])) continue;
    ++reopened_;
    connect(peers_[i]);
  }
}

}  // namespace infemeral
