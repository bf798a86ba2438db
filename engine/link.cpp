#include "engine/link.h"

#include <utility>

namespace infemeral {

absl::Status Link::submit(const StepRequest& request, std::stop_token stop, PhaseTimes& times) {
  StepReply reply;
  if (absl::Status status = step(request, stop, reply, times); !status.ok()) return status;
  answered_.push_back(std::move(reply));
  return absl::OkStatus();
}

absl::Status Link::await(std::stop_token, StepReply& reply, PhaseTimes&) {
  if (answered_.empty()) return absl::InternalError("no step is out");
  reply = std::move(answered_.front());
  answered_.pop_front();
  return absl::OkStatus();
}

absl::Status Link::reconnect(std::stop_token) {
  return absl::UnimplementedError("this link cannot connect again");
}

}  // namespace infemeral
