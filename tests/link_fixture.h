// A body with a known answer, a server around it, and a TCP relay that sees what crosses the line.
#pragma once

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <catch2/catch.hpp>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "net/body_server.h"
#include "net/client_link.h"

namespace infemeral {

using std::chrono::milliseconds;
inline constexpr WireDtype kDtypes[] = {WireDtype::kF32, WireDtype::kF16, WireDtype::kI8};

// Waits for what another thread does soon; false after ten seconds.
inline bool soon(const std::function<bool()>& condition) {
  for (int i = 0; i < 1000; ++i) {
    if (condition()) return true;
    std::this_thread::sleep_for(milliseconds(10));
  }
  return false;
}

inline std::string text_of(const absl::Status& status) {
  return std::string(status.message());
}

inline void check_says(const absl::Status& status, absl::StatusCode code,
                       const std::string& words) {
  INFO(status);
  CHECK(status.code() == code);
  CHECK(text_of(status).find(words) != std::string::npos);
}

// Row p of a session answers with its state plus the sum of the first elements of rows 0..p: wrong
// order, a cache that was not cut, or another session's rows change it.
inline std::vector<float> known_answer(const std::vector<std::vector<float>>& rows, std::size_t p) {
  float sum = 0;
  for (std::size_t i = 0; i <= p; ++i) sum += rows[i][0];
  std::vector<float> out = rows[p];
  for (float& x : out) x += sum;
  return out;
}

class KnownBody : public Body {
 public:
  explicit KnownBody(std::uint32_t hidden_size) {
    info_.description = "known body";
    info_.hidden_size = hidden_size;
    info_.max_context = 2000;
    info_.kv_bytes_per_token = sizeof(float);
    info_.model_fingerprint.fill(0x5a);
    info_.cloak_commitment.fill(0xc3);
  }
  ~KnownBody() override { CHECK(sessions == 0); }

  const BodyInfo& info() const override { return info_; }

  absl::StatusOr<std::unique_ptr<BodySession>> new_session() override {
    return std::make_unique<Session>(*this);
  }

  void run(std::span<BodyStep> steps) override {
    if (running_.exchange(true)) overlapped = true;
    if (before_run) before_run();
    largest_batch = std::max(largest_batch.load(), steps.size());
    for (BodyStep& step : steps) step.status = run_one(step);
    running_ = false;
  }

  std::atomic<int> sessions = 0;
  std::atomic<std::size_t> largest_batch = 0;
  std::atomic<bool> overlapped = false;
  std::atomic<bool> broken = false;  // answers hold one value that is not finite
  std::atomic<bool> gone = false;    // whoever ran the layers has ended
  std::function<void()> before_run;  // set before the first step
  // Everything that the server process saw; read it when nothing runs.
  std::vector<float> seen;

 private:
  struct Session : BodySession {
    explicit Session(KnownBody& owner) : body(owner) { ++body.sessions; }
    ~Session() override { --body.sessions; }
    std::uint32_t kv_len() const override { return static_cast<std::uint32_t>(rows.size()); }
    std::size_t kv_bytes() const override { return rows.size() * sizeof(float); }
    KnownBody& body;
    std::vector<std::vector<float>> rows;
  };

  absl::Status run_one(BodyStep& step) {
    if (gone) return absl::UnavailableError("who ran the layers has ended");
    auto& session = dynamic_cast<Session&>(*step.session);
    if (step.start_pos > session.rows.size()) {
      return absl::InvalidArgumentError("the step starts beyond the cache");
    }
    session.rows.resize(step.start_pos);
    seen.insert(seen.end(), step.states.begin(), step.states.end());
    for (std::size_t i = 0; i < step.rows; ++i) {
      const auto row = step.states.subspan(i * info_.hidden_size, info_.hidden_size);
      session.rows.emplace_back(row.begin(), row.end());
    }
    const std::size_t back = step.out.size() / info_.hidden_size;
    for (std::size_t i = 0; i < back; ++i) {
      const auto answer = known_answer(session.rows, session.rows.size() - back + i);
      std::copy(answer.begin(), answer.end(), step.out.begin() + i * info_.hidden_size);
    }
    if (broken && !step.out.empty()) step.out.back() = std::nanf("");
    return absl::OkStatus();
  }

  BodyInfo info_;
  std::atomic<bool> running_ = false;
};

// Forwards one listening port to another, keeps a copy of all bytes, and can cut or freeze the
// line.
class Relay {
 public:
  explicit Relay(int target) : target_(target) {
    listener_ = ::socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in address = loopback(0);
    REQUIRE(::bind(listener_, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0);
    REQUIRE(::listen(listener_, 16) == 0);
    socklen_t size = sizeof address;
    REQUIRE(::getsockname(listener_, reinterpret_cast<sockaddr*>(&address), &size) == 0);
    port_ = ntohs(address.sin_port);
    thread_ = std::thread([this] { run(); });
  }
  ~Relay() {
    stop_ = true;
    thread_.join();
    ::close(listener_);
  }

  int port() const { return port_; }
  void cut() { cut_ = true; }
  void freeze() { frozen_ = true; }
  std::string up() {
    const std::lock_guard lock(mutex_);
    return up_;
  }
  std::string down() {
    const std::lock_guard lock(mutex_);
    return down_;
  }

 private:
  static sockaddr_in loopback(int port) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<std::uint16_t>(port));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return address;
  }

  // Copies what has arrived; false when the line has ended.
  bool forward(int from, int to, std::string& copy) {
    char buffer[65536];
    const ssize_t got = ::read(from, buffer, sizeof buffer);
    if (got <= 0) return false;
    for (ssize_t sent = 0; sent < got;) {
      const ssize_t n =
          ::send(to, buffer + sent, static_cast<std::size_t>(got - sent), MSG_NOSIGNAL);
      if (n <= 0) return false;
      sent += n;
    }
    const std::lock_guard lock(mutex_);
    copy.append(buffer, static_cast<std::size_t>(got));
    return true;
  }

  void run() {
    std::vector<std::pair<int, int>> lines;  // client, server
    while (!stop_) {
      if (cut_) {
        for (auto [client, server] : lines) {
          ::close(client);
          ::close(server);
        }
        lines.clear();
      }
      std::vector<pollfd> polls;
      if (!cut_) polls.push_back({listener_, POLLIN, 0});
      const std::size_t first = polls.size();
      for (auto [client, server] : lines) {
        polls.push_back({frozen_ ? -1 : client, POLLIN, 0});
        polls.push_back({frozen_ ? -1 : server, POLLIN, 0});
      }
      ::poll(polls.data(), polls.size(), 10);
      for (std::size_t i = lines.size(); i-- > 0;) {
        const auto [client, server] = lines[i];
        const bool ok = (polls[first + 2 * i].revents == 0 || forward(client, server, up_)) &&
                        (polls[first + 2 * i + 1].revents == 0 || forward(server, client, down_));
        if (!ok) {
          ::close(client);
          ::close(server);
          lines.erase(lines.begin() + static_cast<std::ptrdiff_t>(i));
        }
      }
      if (first == 1 && polls[0].revents != 0) {
        const int client = ::accept(listener_, nullptr, nullptr);
        const int server = ::socket(AF_INET, SOCK_STREAM, 0);
        sockaddr_in address = loopback(target_);
        if (::connect(server, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0) {
          lines.emplace_back(client, server);
        } else {
          ::close(client);
          ::close(server);
        }
      }
    }
    for (auto [client, server] : lines) {
      ::close(client);
      ::close(server);
    }
  }

  int listener_ = -1;
  int port_ = 0;
  const int target_;
  std::atomic<bool> stop_ = false, cut_ = false, frozen_ = false;
  std::mutex mutex_;
  std::string up_, down_;
  std::thread thread_;
};

// A body, its server and a client's options that fit both.
struct Rig {
  explicit Rig(std::uint32_t hidden_size = 96) : body(hidden_size) {
    server_options.identity = &server_identity;
    server_options.allow = {Identity::generate().public_key(), client_identity.public_key()};
    server_options.max_rows_per_step = 600;
    options.server_key = server_identity.public_key();
    options.identity = &client_identity;
    options.model_fingerprint = body.info().model_fingerprint;
    options.cloak_commitment = body.info().cloak_commitment;
    options.hidden_size = hidden_size;
    options.spin = std::random_device{}() % 2 == 0;  // nothing but the time depends on it
  }

  void start() {
    auto started = BodyServer::start(body, server_options);
    INFO(started.status());
    REQUIRE(started.ok());
    server = *std::move(started);
    use_port(server->port());
  }
  void use_port(int port) { options.server = "127.0.0.1:" + std::to_string(port); }

  std::unique_ptr<Link> connect() {
    auto link = connect_link(options);
    INFO(link.status());
    REQUIRE(link.ok());
    return *std::move(link);
  }

  KnownBody body;
  Identity server_identity = Identity::generate();
  Identity client_identity = Identity::generate();
  BodyServerOptions server_options;
  ClientLinkOptions options;
  std::unique_ptr<BodyServer> server;
};

// A client's half of a conversation with a KnownBody: sends random rows and knows the answers.
class Talk {
 public:
  Talk(Link& link, std::uint32_t hidden_size, WireDtype dtype)
      : link_(link), hidden_size_(hidden_size), dtype_(dtype) {
    auto opened = link_.open_session({});
    INFO(opened.status());
    REQUIRE(opened.ok());
    session = *opened;
  }

  // One step; `rows` keeps what the body must hold. Not with Catch's macros, for other threads.
  absl::Status step(std::uint32_t start_pos, std::uint32_t count, Wanted wanted) {
    const std::size_t row_bytes = wire_row_bytes(dtype_, hidden_size_);
    std::vector<std::byte> wire(count * row_bytes);
    rows.resize(start_pos);
    std::normal_distribution<float> normal(0, 1);
    for (std::size_t i = 0; i < count; ++i) {
      std::vector<float> row(hidden_size_);
      for (float& x : row) x = normal(rng_);
      encode_wire_row(dtype_, row, wire.data() + i * row_bytes);
      decode_wire_row(dtype_, wire.data() + i * row_bytes, row);
      rows.push_back(std::move(row));
    }
    sent.assign(wire.begin(), wire.end());
    const absl::Status status = link_.step({.session = session.id,
                                            .start_pos = start_pos,
                                            .rows = count,
                                            .dtype = dtype_,
                                            .tensor = wire,
                                            .wanted = wanted},
                                           {}, reply, times);
    if (!status.ok()) return status;

    const std::size_t back = wanted == Wanted::kNone ? 0 : wanted == Wanted::kLast ? 1 : count;
    std::vector<std::byte> expected(back * row_bytes);
    for (std::size_t i = 0; i < back; ++i) {
      encode_wire_row(dtype_, known_answer(rows, rows.size() - back + i),
                      expected.data() + i * row_bytes);
    }
    if (reply.rows != back || reply.kv_len != rows.size() || reply.tensor != expected) {
      return absl::InternalError("the answer is not the known one");
    }
    return absl::OkStatus();
  }

  SessionInfo session;
  std::vector<std::vector<float>> rows;
  std::vector<std::byte> sent;  // the last step's tensor
  StepReply reply;
  PhaseTimes times;

 private:
  Link& link_;
  const std::uint32_t hidden_size_;
  const WireDtype dtype_;
  std::mt19937_64 rng_{std::random_device{}()};
};

}  // namespace infemeral
