// The server's end of TCP: listens, and hands connections over.
//
// Instead of gRPC's own listener, which in 1.51 ends for good when the process has no descriptor
// left: whoever opened enough connections, without any key, would have shut the server for
// everybody. This one turns newcomers away while there are too many, and goes on.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/log.h"

namespace infemeral {

class Listener {
 public:
  // `address` is "host:port" or "[v6]:port"; every address of the host is listened on, and port 0
  // takes a free one. InvalidArgument when it is not of that form; Unavailable when it cannot be
  // listened on.
  static absl::StatusOr<std::unique_ptr<Listener>> open(const std::string& address, LogSink log);

  ~Listener();  // closes the port
  Listener(const Listener&) = delete;
  Listener& operator=(const Listener&) = delete;

  int port() const { return port_; }

  // From now on `take` is called for every connection, on a thread of the listener's own, and owns
  // it. Connections that came before have waited. Once.
  using Take = std::function<void(int listener, int connection)>;
  void start(Take take);

 private:
  explicit Listener(LogSink log);
  void run(const Take& take);
  void accept_from(int listener, const Take& take);
  void turned_away();

  const LogSink log_;
  std::vector<int> sockets_;
  int wake_ = -1;
  int port_ = 0;
  std::int64_t silent_until_ms_ = 0;  // turning away is logged once in a while
  std::thread thread_;
};

}  // namespace infemeral
