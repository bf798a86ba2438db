// A TCP line between a client and a server, with the faults and the speed that a test asks for.
#pragma once

#include <poll.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <list>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

namespace infemeral {

struct LineOptions {
  int target = 0;  // port of the server, on this machine
  std::chrono::microseconds one_way_delay{0};
  double bytes_per_second = 0;  // each way; 0: as fast as it goes
};

// Listens on a free port of the loopback interface and forwards every connection to the target. All
// functions may be called from any thread, and what they do is done when they return.
class Line {
 public:
  explicit Line(const LineOptions& options);  // throws std::runtime_error
  ~Line();
  Line(const Line&) = delete;
  Line& operator=(const Line&) = delete;

  int port() const { return port_; }
  // Of later connections.
  void set_target(int port);

  // What happens to the connections that are open; later ones work.
  void cut();                                 // both ends see a reset
  void freeze();                              // a black hole: nothing arrives, nothing is closed
  void inject(const std::string& to_client);  // behind what was forwarded so far
  void damage();                              // one bit of the server's next answer

  // The connection that comes next ends once it has carried so many bytes, both ways together: with
  // a reset, or as if both ends had closed it.
  void cut_next_after(std::uint64_t bytes, bool reset);

  std::uint64_t bytes_up() const { return bytes_up_; }
  std::uint64_t bytes_down() const { return bytes_down_; }

 private:
  using Clock = std::chrono::steady_clock;

  struct Piece {
    Clock::time_point due;
    std::string bytes;
    std::size_t written = 0;
  };
  struct Direction {
    int from = -1, to = -1;
    std::deque<Piece> pieces;
    Clock::time_point sent_until{};  // when the line has taken in what it was given so far
    bool ended = false;              // `from` has no more
    bool damage = false;
  };
  struct Cut {
    std::uint64_t bytes_left = 0;
    bool reset = false;
  };
  struct Pair {
    Direction up, down;
    bool frozen = false;
    std::optional<Cut> cut;
  };

  void on_thread(const std::function<void()>& action);
  void run();
  void accept_one();
  // False when the connection has ended.
  bool take(Pair& pair, Direction& direction, std::atomic<std::uint64_t>& count);
  bool give(Direction& direction, Clock::time_point now);
  bool has_room(const Direction& direction, Clock::time_point now) const;
  void close(Pair& pair, bool reset);

  const LineOptions options_;
  std::atomic<int> target_;
  int listener_ = -1;
  int wake_ = -1;
  int port_ = 0;
  std::atomic<std::uint64_t> bytes_up_ = 0, bytes_down_ = 0;
  std::list<Pair> pairs_;
  std::optional<Cut> cut_next_;

  std::mutex mutex_;
  std::condition_variable done_;
  std::function<void()> action_;
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace infemeral
