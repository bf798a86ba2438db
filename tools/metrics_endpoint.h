// A body server's counters for Prometheus, over HTTP.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "net/body_server.h"

namespace infemeral {

// Answers GET /metrics on a thread of its own until it is destroyed. The server is borrowed.
class MetricsEndpoint {
 public:
  // "HOST:PORT" or "[v6]:PORT"; port 0 takes a free one. InvalidArgument for an address that is
  // none, Unavailable when it cannot be listened on.
  static absl::StatusOr<std::unique_ptr<MetricsEndpoint>> open(const std::string& address,
                                                               const BodyServer& server);
  virtual ~MetricsEndpoint() = default;

  virtual const std::string& address() const = 0;  // with the port that it got
};

}  // namespace infemeral
