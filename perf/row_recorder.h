// The rows that a body returns, for what is then measured or compared without it.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "engine/link.h"

namespace infemeral {

// Passes everything on, and keeps the single rows that steps bring back.
class RowRecorder final : public Link {
 public:
  explicit RowRecorder(Link& link) : link_(link) {}

  absl::StatusOr<SessionInfo> open_session(std::stop_token stop) override {
    return link_.open_session(stop);
  }
  absl::Status step(const StepRequest& request, std::stop_token stop, StepReply& reply,
                    PhaseTimes& times) override {
    const absl::Status status = link_.step(request, stop, reply, times);
    if (status.ok() && reply.rows == 1) rows_.push_back(reply.tensor);
    return status;
  }
  void close_session(std::uint64_t session) override { link_.close_session(session); }
  LinkCounters counters() const override { return link_.counters(); }
  std::string cipher() const override { return link_.cipher(); }

  const std::vector<std::vector<std::byte>>& rows() const { return rows_; }

 private:
  Link& link_;
  std::vector<std::vector<std::byte>> rows_;
};

}  // namespace infemeral
