// Clients that come and go, in good order or in the middle of anything.
#pragma once

#include <cstdint>
#include <random>
#include <string>

#include "tests/line.h"
#include "tests/server_process.h"

namespace infemeral {

// Makes one connection after the other to a server, through a line of its own, and ends each in a
// way drawn at random. One thread; throws std::runtime_error for a server that does something
// wrong.
class Visitor {
 public:
  Visitor(const Deployment& deployment, int port, std::size_t client);

  void visit();

  // What there was so far: visits; and of these, those whose line was cut (at any byte of the whole
  // conversation, from the TCP connection on), and those that left while a step was running.
  std::uint64_t visits() const { return visits_; }
  std::uint64_t cuts() const { return cuts_; }
  std::uint64_t mid_step() const { return mid_step_; }

 private:
  enum class Way { kInOrder, kWithoutClose, kMidStep, kCut };
  absl::Status converse(Way way);

  Line line_;
  const ClientLinkOptions options_;
  std::mt19937_64 random_{std::random_device{}()};
  std::uint64_t conversation_bytes_ = 0;  // of a visit in good order, both ways
  std::uint64_t visits_ = 0, cuts_ = 0, mid_step_ = 0;
};

// TCP connections that come no further than somebody without a key can: to be opened, kept up and
// closed by one thread.
class HalfOpenCrowd {
 public:
  // How far a connection goes.
  enum class Stage {
    kTcp,        // connected
    kHttp2,      // HTTP/2 settings exchanged; pings are not answered
    kAnswering,  // likewise, and pings are answered
    kStream      // likewise, and a stream is open, without a hello
  };

  HalfOpenCrowd(int port, std::size_t size);  // a quarter of each stage
  ~HalfOpenCrowd();                           // closes all
  HalfOpenCrowd(const HalfOpenCrowd&) = delete;
  HalfOpenCrowd& operator=(const HalfOpenCrowd&) = delete;

  // Reads and answers what has come, for up to `timeout`, and opens anew what the server has ended.
  void keep_up(std::chrono::milliseconds timeout);
  std::uint64_t reopened() const { return reopened_; }  // because the server ended them

 private:
  struct Peer {
    Stage stage{};
    int fd = -1;
    std::string unread;
  };
  void connect(Peer& peer);
  // False when the server has ended the connection.
  bool take(Peer& peer);

  const int port_;
  std::vector<Peer> peers_;
  std::uint64_t reopened_ = 0;
};

}  // namespace infemeral
