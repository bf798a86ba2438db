#include "net/admission.h"

#include <utility>

#include "absl/strings/str_cat.h"

namespace infemeral {

SessionLease::SessionLease(std::shared_ptr<Admission> admission, const PublicKey& client)
    : admission_(std::move(admission)), client_(client) {}

SessionLease::~SessionLease() {
  const std::lock_guard lock(admission_->mutex_);
  --admission_->sessions_;
  admission_->positions_ -= positions_;
  const auto own = admission_->of_client_.find(client_);
  if (--own->second == 0) admission_->of_client_.erase(own);
}

absl::Status SessionLease::reserve(std::uint32_t end) {
  if (end <= positions_) return absl::OkStatus();
  const std::lock_guard lock(admission_->mutex_);
  if (end > admission_->limits_.positions) {
    return absl::InvalidArgumentError(
        absl::StrCat("the server's memory for KV caches holds ", admission_->limits_.positions,
                     " positions, not ", end, "; use a shorter prompt"));
  }
  const std::uint64_t more = end - positions_;
  if (more > admission_->limits_.positions - admission_->positions_) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "the server's memory for KV caches has no room for ", end, " positions; try again later"));
  }
  admission_->positions_ += more;
  positions_ = end;
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<SessionLease>> Admission::admit(const PublicKey& client) {
  const std::lock_guard lock(mutex_);
  if (sessions_ >= limits_.sessions) {
    return absl::ResourceExhaustedError(absl::StrCat("the server has all of its ", limits_.sessions,
                                                     " sessions in use; try again later"));
  }
  std::uint32_t& own = of_client_[client];
  if (own >= limits_.sessions_per_client) {
    return absl::ResourceExhaustedError(
        absl::StrCat("this client has all of the ", limits_.sessions_per_client,
                     " sessions that the server gives to one; close one first"));
  }
  auto lease = std::make_unique<SessionLease>(shared_from_this(), client);
  ++own;
  ++sessions_;
  return lease;
}

void Admission::set_sessions_per_client(std::uint32_t limit) {
  const std::lock_guard lock(mutex_);
  limits_.sessions_per_client = limit;
}

std::uint32_t Admission::sessions() const {
  const std::lock_guard lock(mutex_);
  return sessions_;
}

std::uint64_t Admission::positions() const {
  const std::lock_guard lock(mutex_);
  return positions_;
}

}  // namespace infemeral
