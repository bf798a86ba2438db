// A link that keeps what came back.
#pragma once

#include <string>
#include <vector>

#include "engine/link.h"

namespace infemeral {

// Remembers the last row.
class RecordingLink final : public Link {
 public:
  explicit RecordingLink(Link& link) : link_(link) {}
  absl::StatusOr<SessionInfo> open_session(std::stop_token stop) override {
    return link_.open_session(stop);
  }
  absl::Status step(const StepRequest& request, std::stop_token stop, StepReply& reply,
                    PhaseTimes& times) override {
    const absl::Status status = link_.step(request, stop, reply, times);
    if (status.ok() && !reply.tensor.empty()) row = reply.tensor;
    return status;
  }
  void close_session(std::uint64_t session) override { link_.close_session(session); }
  LinkCounters counters() const override { return link_.counters(); }
  std::string cipher() const override { return link_.cipher(); }

  std::vector<std::byte> row;

 private:
  Link& link_;
};

}  // namespace infemeral
