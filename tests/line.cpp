#include "tests/line.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <stdexcept>
#include <utility>
#include <vector>

namespace infemeral {
namespace {

constexpr std::size_t kPiece = 16384;
constexpr std::size_t kDamaged = 100;  // shorter ones are acknowledgements of pings and the like
// What the router before the slow line holds, beyond what is on the line.
constexpr std::chrono::milliseconds kQueue{20};

sockaddr_in loopback(int port) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<std::uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return address;
}

void prepare(int fd) {
  const int on = 1;
  ::setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  ::fcntl(fd, F_SETFL, ::fcntl(fd, F_GETFL) | O_NONBLOCK);
}

}  // namespace

Line::Line(const LineOptions& options) : options_(options), target_(options.target) {
  listener_ = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  wake_ = ::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  sockaddr_in address = loopback(0);
  socklen_t size = sizeof address;
  if (listener_ < 0 || wake_ < 0 ||
      ::bind(listener_, reinterpret_cast<sockaddr*>(&address), size) != 0 ||
      ::listen(listener_, 64) != 0 ||
      ::getsockname(listener_, reinterpret_cast<sockaddr*>(&address), &size) != 0) {
    throw std::runtime_error("no socket to listen on");
  }
  port_ = ntohs(address.sin_port);
  thread_ = std::thread([this] { run(); });
}

Line::~Line() {
  on_thread([this] { stop_ = true; });
  thread_.join();
  for (Pair& pair : pairs_) close(pair, false);
  ::close(listener_);
  ::close(wake_);
}

void Line::on_thread(const std::function<void()>& action) {
  std::unique_lock lock(mutex_);
  done_.wait(lock, [&] { return !action_; });
  action_ = action;
  const std::uint64_t one = 1;
  (void)!::write(wake_, &one, sizeof one);
  done_.wait(lock, [&] { return !action_; });
  done_.notify_all();
}

void Line::set_target(int port) {
  target_ = port;
}

void Line::cut() {
  on_thread([this] {
    for (Pair& pair : pairs_) close(pair, true);
    pairs_.clear();
  });
}

void Line::freeze() {
  on_thread([this] {
    for (Pair& pair : pairs_) pair.frozen = true;
  });
}

void Line::inject(const std::string& to_client) {
  on_thread([&] {
    for (Pair& pair : pairs_) pair.down.pieces.push_back({Clock::now(), to_client});
  });
}

void Line::damage() {
  on_thread([this] {
    for (Pair& pair : pairs_) pair.down.damage = true;
  });
}

void Line::cut_next_after(std::uint64_t bytes, bool reset) {
  on_thread([&] { cut_next_ = Cut{bytes, reset}; });
}

void Line::close(Pair& pair, bool reset) {
  for (const int fd : {pair.up.from, pair.up.to}) {
    const linger at_once{1, 0};
    if (reset) ::setsockopt(fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
    ::close(fd);
  }
}

void Line::accept_one() {
  const int client = ::accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC);
  if (client < 0) return;
  const int server = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address = loopback(target_);
  if (::connect(server, reinterpret_cast<sockaddr*>(&address), sizeof address) != 0) {
    ::close(client);
    ::close(server);
    return;
  }
  prepare(client);
  prepare(server);
  Pair pair;
  pair.up.from = pair.down.to = client;
  pair.up.to = pair.down.from = server;
  pair.cut = std::exchange(cut_next_, std::nullopt);
  pairs_.push_back(std::move(pair));
}

bool Line::has_room(const Direction& direction, Clock::time_point now) const {
  if (direction.ended) return false;
  if (options_.bytes_per_second <= 0) return direction.pieces.size() < 64;
  return direction.sent_until <= now + kQueue;
}

bool Line::take(Pair& pair, Direction& direction, std::atomic<std::uint64_t>& count) {
  std::string bytes(kPiece, '\0');
  const ssize_t got = ::read(direction.from, bytes.data(), bytes.size());
  if (got < 0) return errno == EAGAIN || errno == EINTR;
  if (got == 0) {
    direction.ended = true;
    return true;
  }
  bytes.resize(static_cast<std::size_t>(got));
  if (pair.cut) {
    bytes.resize(std::min<std::uint64_t>(bytes.size(), pair.cut->bytes_left));
    pair.cut->bytes_left -= bytes.size();
  }
  count += bytes.size();
  if (direction.damage && bytes.size() >= kDamaged) {
    direction.damage = false;
    bytes[bytes.size() / 2] ^= 0x10;
  }
  const auto now = Clock::now();
  direction.sent_until = std::max(direction.sent_until, now);
  if (options_.bytes_per_second > 0) {
    direction.sent_until += std::chrono::duration_cast<Clock::duration>(
        std::chrono::duration<double>(static_cast<double>(got) / options_.bytes_per_second));
  }
  direction.pieces.push_back({direction.sent_until + options_.one_way_delay, std::move(bytes)});
  return true;
}

bool Line::give(Direction& direction, Clock::time_point now) {
  while (!direction.pieces.empty() && direction.pieces.front().due <= now) {
    Piece& piece = direction.pieces.front();
    const ssize_t sent = ::send(direction.to, piece.bytes.data() + piece.written,
                                piece.bytes.size() - piece.written, MSG_NOSIGNAL);
    if (sent < 0) return errno == EAGAIN || errno == EINTR;
    piece.written += static_cast<std::size_t>(sent);
    if (piece.written < piece.bytes.size()) return true;
    direction.pieces.pop_front();
  }
  return !(direction.ended && direction.pieces.empty());
}

void Line::run() {
  while (true) {
    {
      const std::lock_guard lock(mutex_);
      std::uint64_t count = 0;
      (void)!::read(wake_, &count, sizeof count);
      if (action_) {
        action_();
        action_ = nullptr;
        done_.notify_all();
      }
      if (stop_) return;
    }
    auto now = Clock::now();
    auto wake_at = now + std::chrono::seconds(1);
    std::vector<pollfd> polls = {{listener_, POLLIN, 0}, {wake_, POLLIN, 0}};
    for (auto pair = pairs_.begin(); pair != pairs_.end();) {
      bool alive = pair->frozen || (give(pair->up, now) && give(pair->down, now));
      const bool cut = pair->cut && pair->cut->bytes_left == 0 && pair->up.pieces.empty() &&
                       pair->down.pieces.empty();
      if (cut) alive = false;
      if (!alive) {
        close(*pair, cut && pair->cut->reset);
        pair = pairs_.erase(pair);
        continue;
      }
      for (Direction* direction : {&pair->up, &pair->down}) {
        const bool room = !pair->frozen && has_room(*direction, now);
        polls.push_back({room ? direction->from : -1, POLLIN, 0});
        bool blocked = false;
        if (!pair->frozen && !direction->pieces.empty()) {
          const auto due = direction->pieces.front().due;
          blocked = due <= now;
          if (!blocked) wake_at = std::min(wake_at, due);
        }
        if (!pair->frozen && !room && !direction->ended && options_.bytes_per_second > 0) {
          wake_at = std::min(wake_at, direction->sent_until - kQueue);
        }
        polls.push_back({blocked ? direction->to : -1, POLLOUT, 0});
      }
      ++pair;
    }
    now = Clock::now();
    const auto sleep = std::chrono::duration_cast<std::chrono::nanoseconds>(
        std::max(Clock::duration::zero(), wake_at - now));
    const timespec timeout{sleep.count() / 1000000000, sleep.count() % 1000000000};
    ::ppoll(polls.data(), polls.size(), &timeout, nullptr);
    std::size_t i = 2;
    for (auto pair = pairs_.begin(); pair != pairs_.end(); i += 4) {
      const bool alive = (polls[i].revents == 0 || take(*pair, pair->up, bytes_up_)) &&
                         (polls[i + 2].revents == 0 || take(*pair, pair->down, bytes_down_));
      if (alive) {
        ++pair;
      } else {
        close(*pair, false);
        pair = pairs_.erase(pair);
      }
    }
    if (polls[0].revents != 0) accept_one();
  }
}

}  // namespace infemeral
