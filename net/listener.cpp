#include "net/listener.h"

#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <utility>

#include "absl/strings/str_cat.h"
#include "net/address.h"

namespace infemeral {
namespace {

// Descriptors that connections leave to everything else: gRPC's own, files, metrics.
constexpr rlim_t kReserve = 64;
// Where the system itself has no descriptor: until it is asked again.
constexpr std::chrono::milliseconds kPause{20};
constexpr std::int64_t kSilenceMs = 10000;

// Descriptors are given from the lowest on: one of this number means that as many are open.
int highest_connection() {
  rlimit limit{};
  if (::getrlimit(RLIMIT_NOFILE, &limit) != 0) return 0;
  const rlim_t reserve = std::min(kReserve, limit.rlim_cur / 4);
  return static_cast<int>(std::min<rlim_t>(limit.rlim_cur, 1 << 30) - reserve);
}

int port_of(int socket) {
  sockaddr_storage address{};
  socklen_t size = sizeof address;
  if (::getsockname(socket, reinterpret_cast<sockaddr*>(&address), &size) != 0) return 0;
  return ntohs(address.ss_family == AF_INET6 ? reinterpret_cast<sockaddr_in6*>(&address)->sin6_port
                                             : reinterpret_cast<sockaddr_in*>(&address)->sin_port);
}

// A listening socket, or -1.
int listen_on(const addrinfo& address, int port) {
  const int socket = ::socket(address.ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (socket < 0) return -1;
  const int on = 1;
  ::setsockopt(socket, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  ::setsockopt(socket, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);  // inherited by connections
  sockaddr_storage bound{};
  std::copy_n(reinterpret_cast<const char*>(address.ai_addr), address.ai_addrlen,
              reinterpret_cast<char*>(&bound));
  if (address.ai_family == AF_INET6) {
    reinterpret_cast<sockaddr_in6*>(&bound)->sin6_port = htons(static_cast<std::uint16_t>(port));
  } else {
    reinterpret_cast<sockaddr_in*>(&bound)->sin_port = htons(static_cast<std::uint16_t>(port));
  }
  if (::bind(socket, reinterpret_cast<sockaddr*>(&bound), address.ai_addrlen) != 0 ||
      ::listen(socket, SOMAXCONN) != 0) {
    ::close(socket);
    return -1;
  }
  return socket;
}

}  // namespace

Listener::Listener(LogSink log)
    : log_(std::move(log)), wake_(::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {}

absl::StatusOr<std::unique_ptr<Listener>> Listener::open(const std::string& address, LogSink log) {
  const std::size_t colon = address.rfind(':');
  std::string host = colon == std::string::npos ? "" : address.substr(0, colon);
  const std::string port = colon == std::string::npos ? "" : address.substr(colon + 1);
  if (host.size() > 2 && host.front() == '[' && host.back() == ']') {
    host = host.substr(1, host.size() - 2);
  }
  if (host.empty() || !is_port(port)) {
    return absl::InvalidArgumentError(
        absl::StrCat("the address \"", address, "\" to listen on is not of the form host:port"));
  }
  std::unique_ptr<Listener> listener(new Listener(std::move(log)));
  listener->port_ = std::stoi(port);
  addrinfo hints{};
  hints.ai_flags = AI_PASSIVE;
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  if (::getaddrinfo(host.c_str(), port.c_str(), &hints, &found) == 0) {
    for (const addrinfo* one = found; one != nullptr; one = one->ai_next) {
      if (one->ai_family != AF_INET && one->ai_family != AF_INET6) continue;
      const int socket = listen_on(*one, listener->port_);
      if (socket < 0) continue;
      listener->sockets_.push_back(socket);
      if (listener->port_ == 0) listener->port_ = port_of(socket);
    }
    ::freeaddrinfo(found);
  }
  if (listener->sockets_.empty() || listener->wake_ < 0 || listener->port_ == 0) {
    return absl::UnavailableError(
        absl::StrCat("cannot listen on ", address,
                     "; is the address one of this machine's, and the port free and permitted?"));
  }
  return listener;
}

Listener::~Listener() {
  if (thread_.joinable()) {
    const std::uint64_t one = 1;
    (void)!::write(wake_, &one, sizeof one);
    thread_.join();
  }
  for (const int socket : sockets_) ::close(socket);
  if (wake_ >= 0) ::close(wake_);
}

void Listener::start(Take take) {
  thread_ = std::thread([this, take = std::move(take)] { run(take); });
}

void Listener::run(const Take& take) {
  std::vector<pollfd> polls = {{wake_, POLLIN, 0}};
  for (const int socket : sockets_) polls.push_back({socket, POLLIN, 0});
  while (true) {
    if (::poll(polls.data(), polls.size(), -1) < 0 && errno != EINTR) return;
    if (polls[0].revents != 0) return;
    for (std::size_t i = 1; i < polls.size(); ++i) {
      if (polls[i].revents != 0) accept_from(polls[i].fd, take);
    }
  }
}

void Listener::accept_from(int listener, const Take& take) {
  const int connection = ::accept4(listener, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
  if (connection >= 0 && connection < highest_connection()) {
    take(listener, connection);
  } else if (connection >= 0) {
    ::close(connection);
    turned_away();
  } else if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) {
    turned_away();
    pollfd wake{wake_, POLLIN, 0};
    ::poll(&wake, 1, static_cast<int>(kPause.count()));
  }
}

void Listener::turned_away() {
  const auto now = std::chrono::duration_cast<std::chrono::milliseconds>(
                       std::chrono::steady_clock::now().time_since_epoch())
                       .count();
  if (now < silent_until_ms_) return;
  silent_until_ms_ = now + kSilenceMs;
  log_to(log_, LogLevel::kWarning,
         "turning connections away: too many are open for this process's limit of descriptors "
         "(ulimit -n)");
}

}  // namespace infemeral
