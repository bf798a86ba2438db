// A server's connection without a network: its stream and its queue of steps are driven by hand, so
// that a test decides what happens, and in which order. One thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "net/connection.h"
#include "net/scheduler.h"

namespace infemeral {

// Steps wait until run() is told which of them is next.
class ManualQueue final : public StepQueue {
 public:
  explicit ManualQueue(Body& body) : body_(body) {}

  void submit(StepJob job) override { jobs_.push_back(std::move(job)); }
  std::uint32_t waiting() const override { return static_cast<std::uint32_t>(jobs_.size()); }

  // Runs the oldest step of the session whose step stands at `index`.
  void run(std::size_t index) {
    std::size_t oldest = 0;
    while (jobs_[oldest].session != jobs_[index].session) ++oldest;
    StepJob job = std::move(jobs_[oldest]);
    jobs_.erase(jobs_.begin() + static_cast<std::ptrdiff_t>(oldest));
    if (job.abandoned()) return;
    if (job.make_room(body_.info().hidden_size)) {
      BodyStep step{.session = job.session->body.get(),
                    .start_pos = job.start_pos,
                    .rows = job.rows,
                    .states = job.states,
                    .wanted = job.wanted,
                    .out = job.out};
      body_.run({&step, 1});
      job.status = std::move(step.status);
    }
    job.kv_len = job.session->body->kv_len();
    job.done(job);
  }

 private:
  Body& body_;
  std::deque<StepJob> jobs_;
};

// Nothing completes by itself. What has ended is freed with the object, after the last read and
// write are done and the connection has been told.
class MemoryStream final : public EnvelopeStream {
 public:
  explicit MemoryStream(std::shared_ptr<ServerState> state)
      : connection_(std::make_shared<Connection>(std::move(state), *this, "memory")) {
    connection_->begin();
  }
  MemoryStream(const MemoryStream&) = delete;
  MemoryStream& operator=(const MemoryStream&) = delete;

  Connection& connection() { return *connection_; }
  bool reading() const { return reading_ != nullptr; }
  bool writing() const { return writing_ != nullptr; }
  // How the connection ended the stream, once it has.
  const std::optional<absl::Status>& ended() const { return ended_; }
  // Whether the connection called in a way that an EnvelopeStream does not allow.
  bool misused() const { return misused_; }

  // The client's next envelope arrives, or with nothing the end of what it has to say. Needs
  // reading().
  void complete_read(std::optional<v1::Envelope> envelope) {
    v1::Envelope& into = *std::exchange(reading_, nullptr);
    if (envelope) into = *std::move(envelope);
    connection_->on_read_done(envelope.has_value());
  }
  // The envelope that the connection sends leaves, or is lost when not `ok`. Needs writing().
  v1::Envelope complete_write(bool ok) {
    v1::Envelope sent = *std::exchange(writing_, nullptr);
    connection_->on_write_done(ok);
    return sent;
  }
  // After ended(); nothing else may be called then.
  void close() {
    if (reading()) complete_read(std::nullopt);
    connection_->on_done();
  }

  void start_read(v1::Envelope& envelope) override {
    misused_ |= reading() || ended_.has_value();
    reading_ = &envelope;
  }
  void start_write(const v1::Envelope& envelope) override {
    misused_ |= writing() || ended_.has_value();
    writing_ = &envelope;
  }
  void finish(const absl::Status& status) override {
    misused_ |= writing() || ended_.has_value();
    ended_ = status;
  }

 private:
  v1::Envelope* reading_ = nullptr;
  const v1::Envelope* writing_ = nullptr;
  std::optional<absl::Status> ended_;
  bool misused_ = false;
  const std::shared_ptr<Connection> connection_;  // last: it reads as soon as it is there
};

}  // namespace infemeral
