// Which steps share a run of the body, and who runs it. The body here only waits and counts.
#include "net/scheduler.h"

#include <atomic>
#include <catch2/catch.hpp>
#include <chrono>
#include <cstdlib>
#include <future>
#include <map>
#include <thread>
#include <vector>

#include "tests/test_random.h"

namespace infemeral {
namespace {

constexpr auto kRunTime = std::chrono::milliseconds(20);
constexpr std::uint32_t kJoinedRows = 10;
constexpr std::chrono::microseconds kQuickRun{500};

class WaitingBody final : public Body {
 public:
  explicit WaitingBody(std::chrono::microseconds run_time = kRunTime) : run_time_(run_time) {
    info_.hidden_size = 1;
  }
  const BodyInfo& info() const override { return info_; }
  absl::StatusOr<std::unique_ptr<BodySession>> new_session() override {
    return std::make_unique<Session>();
  }
  void run(std::span<BodyStep> steps) override {
    if (running_.exchange(true)) ++overlaps;
    ++runs_of[steps.size()];
    if (run_time_.count() > 0) std::this_thread::sleep_for(run_time_);
    for (BodyStep& step : steps) {
      step.out[0] = step.states[0] + 1;
      step.status = absl::OkStatus();
    }
    running_ = false;
  }

  std::atomic<int> overlaps = 0;       // runs that began while another one was not over
  std::map<std::size_t, int> runs_of;  // by steps; read it when the scheduler is gone

 private:
  struct Session : BodySession {
    std::uint32_t kv_len() const override { return 0; }
    std::size_t kv_bytes() const override { return 0; }
  };
  const std::chrono::microseconds run_time_;
  std::atomic<bool> running_ = false;
  BodyInfo info_;
};

std::shared_ptr<ServedSession> new_session(Body& body) {
  auto session = std::make_shared<ServedSession>();
  session->body = body.new_session().value();
  return session;
}

float answer(Scheduler& scheduler, const std::shared_ptr<ServedSession>& session, float state) {
  std::promise<float> answered;
  StepJob job{.session = session, .rows = 1, .states = {state}};
  job.abandoned = [] { return false; };
  job.done = [&](StepJob& done) { answered.set_value(done.out[0]); };
  scheduler.submit(std::move(job));
  return answered.get_future().get();
}

// Decodes: asks again shortly after every answer.
void decode(Scheduler& scheduler, const std::shared_ptr<ServedSession>& session, int steps) {
  for (int i = 0; i < steps; ++i) {
    const auto state = static_cast<float>(i);
    if (answer(scheduler, session, state) != state + 1) std::abort();
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

TEST_CASE("sessions that decode at the same time come to share runs, though they began apart") {
  // Without waiting for each other they would take turns for ever: each asks while the other's step
  // is run.
  constexpr int kSteps = 40;
  WaitingBody body;
  {
    Scheduler scheduler(body, kJoinedRows, kQuickRun);
    const auto first = new_session(body), second = new_session(body);
    std::thread other([&] {
      std::this_thread::sleep_for(kRunTime / 2);
      decode(scheduler, second, kSteps);
    });
    decode(scheduler, first, kSteps);
    other.join();
  }
  CHECK(body.runs_of[2] > kSteps / 4);
  CHECK(body.runs_of[1] + 2 * body.runs_of[2] == 2 * kSteps);
}

TEST_CASE("a session that decodes no more holds up nobody, and is not kept alive") {
  WaitingBody body;
  Scheduler scheduler(body, kJoinedRows, kQuickRun);
  const auto stays = new_session(body);
  auto leaves = new_session(body);
  std::thread other([&] { decode(scheduler, leaves, 10); });
  decode(scheduler, stays, 10);
  other.join();
  const std::weak_ptr<ServedSession> gone = leaves;
  leaves.reset();
  decode(scheduler, stays, 2);  // the run that it was in is over, and has been cleared
  CHECK(gone.expired());
}

TEST_CASE("only a quick body runs on the thread that brings a step") {
  using std::chrono::microseconds;
  struct Case {
    microseconds run_time, quick_run;
  };
  for (const auto& [run_time, quick_run] :
       {Case{microseconds(0), kQuickRun}, Case{microseconds(2000), kQuickRun},
        Case{microseconds(2000), microseconds(1000000)}}) {
    WaitingBody body(run_time);
    Scheduler scheduler(body, kJoinedRows, quick_run);
    const auto session = new_session(body);
    int here = 0;
    for (int i = 0; i < 200; ++i) {
      std::promise<std::thread::id> ran;
      StepJob job{.session = session, .rows = 1, .states = {0}};
      job.abandoned = [] { return false; };
      job.done = [&](StepJob&) { ran.set_value(std::this_thread::get_id()); };
      scheduler.submit(std::move(job));
      here += ran.get_future().get() == std::this_thread::get_id();
      // As long as a client needs: the scheduler's thread is to have seen the end of its run.
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    CHECK((here > 0) == (run_time < quick_run));
    CHECK(scheduler.waiting() == 0);
  }
}

TEST_CASE("quick steps from many threads are all run, one run at a time") {
  constexpr int kSteps = 2000;
  constexpr std::size_t kThreads = 4;
  WaitingBody body(std::chrono::microseconds(0));
  {
    Scheduler scheduler(body, kJoinedRows, kQuickRun);
    std::vector<std::thread> threads;
    for (std::size_t i = 0; i < kThreads; ++i) {
      threads.emplace_back([&] {
        const auto session = new_session(body);
        for (int j = 0; j < kSteps; ++j) {
          const auto state = static_cast<float>(j);
          if (answer(scheduler, session, state) != state + 1) std::abort();
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
  CHECK(body.overlaps == 0);
  std::size_t steps = 0;
  for (const auto& [size, runs] : body.runs_of) steps += size * static_cast<std::size_t>(runs);
  CHECK(steps == kThreads * kSteps);
}

TEST_CASE("who has an answer and closes the session finds its place free") {
  WaitingBody body;
  Scheduler scheduler(body, kJoinedRows, kQuickRun);
  auto session = new_session(body);
  const std::weak_ptr<ServedSession> weak = session;
  std::promise<bool> gone;
  StepJob job{.session = std::move(session), .rows = 1, .states = {1}};
  job.abandoned = [] { return false; };
  job.done = [&](StepJob&) { gone.set_value(weak.expired()); };
  scheduler.submit(std::move(job));
  CHECK(gone.get_future().get());
}

// Keeps what it is given, and holds up its first run until it may go on.
class RecordingBody final : public Body {
 public:
  struct Seen {
    std::size_t run;
    std::uint32_t start_pos, rows;
    std::vector<float> states;
    Wanted wanted;
  };
  RecordingBody() { info_.hidden_size = 1; }
  const BodyInfo& info() const override { return info_; }
  absl::StatusOr<std::unique_ptr<BodySession>> new_session() override {
    return std::make_unique<Session>();
  }
  void run(std::span<BodyStep> steps) override {
    if (runs == 0) {
      begun.set_value();
      go_on.get_future().wait();
    }
    for (BodyStep& step : steps) {
      auto& session = static_cast<Session&>(*step.session);
      seen[step.session].push_back(
          {runs, step.start_pos, step.rows, {step.states.begin(), step.states.end()}, step.wanted});
      if (step.rows % 7 == 6) {
        step.status = absl::InvalidArgumentError("a number that this body does not like");
        continue;
      }
      session.length = step.start_pos + step.rows;
      std::copy(step.states.end() - static_cast<std::ptrdiff_t>(step.out.size()), step.states.end(),
                step.out.begin());
    }
    ++runs;
  }

  std::promise<void> begun, go_on;
  std::size_t runs = 0;
  std::map<BodySession*, std::vector<Seen>> seen;

 private:
  struct Session : BodySession {
    std::uint32_t kv_len() const override { return length; }
    std::size_t kv_bytes() const override { return 0; }
    std::uint32_t length = 0;
  };
  BodyInfo info_;
};

TEST_CASE("steps that continue each other and wait are run as one, and answered one by one") {
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  constexpr std::size_t kSteps = 200;
  struct Asked {
    std::uint32_t start_pos, rows;
    std::vector<float> states;
    Wanted wanted;
  };
  struct Answered {
    absl::Status status;
    std::vector<float> out;
    std::uint32_t kv_len;
    bool has_time;
  };
  RecordingBody body;
  std::vector<std::shared_ptr<ServedSession>> sessions;
  std::map<BodySession*, std::vector<Asked>> asked;
  std::map<BodySession*, std::vector<Answered>> answered;
  for (int i = 0; i < 3; ++i) sessions.push_back(new_session(body));
  std::atomic<std::size_t> left = kSteps;
  std::promise<void> all;
  {
    Scheduler scheduler(body, kJoinedRows, kQuickRun);
    const auto first = new_session(body);
    StepJob job{.session = first, .rows = 1, .states = {0}};
    job.abandoned = [] { return false; };
    job.done = [](StepJob&) {};
    scheduler.submit(std::move(job));
    body.begun.get_future().wait();

    for (std::size_t i = 0; i < kSteps; ++i) {
      const auto& session = sessions[random_index(sessions.size())];
      BodySession* const key = session->body.get();
      std::vector<Asked>& steps = asked[key];
      Asked step;
      step.start_pos = steps.empty() ? 0 : steps.back().start_pos + steps.back().rows;
      if (random_index(8) == 0) step.start_pos += static_cast<std::uint32_t>(random_index(3)) - 1;
      step.rows = 1 + static_cast<std::uint32_t>(random_index(6));
      step.states.resize(step.rows);
      for (float& state : step.states) state = static_cast<float>(random_index(1 << 20));
      step.wanted = random_index(4) != 0   ? Wanted::kNone
                    : random_index(2) != 0 ? Wanted::kLast
                                           : Wanted::kAll;
      steps.push_back(step);
      StepJob next{.session = session,
                   .start_pos = step.start_pos,
                   .rows = step.rows,
                   .wanted = step.wanted,
                   .states = step.states};
      next.abandoned = [] { return false; };
      next.done = [&, key](StepJob& done) {
        answered[key].push_back({done.status, done.out, done.kv_len, done.compute_ms > 0});
        if (--left == 0) all.set_value();
      };
      scheduler.submit(std::move(next));
    }
    body.go_on.set_value();
    all.get_future().wait();
  }
  for (const auto& [key, steps] : asked) {
    const std::vector<RecordingBody::Seen>& seen = body.seen[key];
    const std::vector<Answered>& answers = answered[key];
    REQUIRE(answers.size() == steps.size());
    std::size_t at = 0;
    for (std::size_t run = 0; run < seen.size(); ++run) {
      // One of a session in a run, and with it all that may go.
      CHECK((run == 0 || seen[run - 1].run < seen[run].run));
      Asked whole = steps[at];
      std::size_t end = at + 1;
      for (; end < steps.size(); ++end) {
        const Asked& next = steps[end];
        if (whole.wanted != Wanted::kNone || next.wanted == Wanted::kAll ||
            next.start_pos != whole.start_pos + whole.rows ||
            whole.rows + next.rows > kJoinedRows) {
          break;
        }
        whole.rows += next.rows;
        whole.states.insert(whole.states.end(), next.states.begin(), next.states.end());
        whole.wanted = next.wanted;
      }
      CHECK(seen[run].start_pos == whole.start_pos);
      CHECK(seen[run].rows == whole.rows);
      CHECK(seen[run].states == whole.states);
      CHECK(seen[run].wanted == whole.wanted);
      for (bool first = true; at < end; ++at, first = false) {
        CHECK(answers[at].status.ok() == (whole.rows % 7 != 6));
        CHECK(answers[at].has_time == first);
        if (!answers[at].status.ok()) continue;
        CHECK(answers[at].kv_len == steps[at].start_pos + steps[at].rows);
        const std::size_t rows = output_rows(steps[at].wanted, steps[at].rows);
        CHECK(answers[at].out ==
              std::vector<float>(steps[at].states.end() - static_cast<std::ptrdiff_t>(rows),
                                 steps[at].states.end()));
      }
    }
    CHECK(at == steps.size());
  }
}

TEST_CASE("steps that nobody waits for are dropped together") {
  RecordingBody body;
  const auto session = new_session(body);
  {
    Scheduler scheduler(body, kJoinedRows, kQuickRun);
    std::promise<void> over;
    for (std::uint32_t i = 0; i < 5; ++i) {
      StepJob job{.session = i == 0 || i == 4 ? new_session(body) : session,
                  .start_pos = i,
                  .rows = 1,
                  .wanted = Wanted::kNone,
                  .states = {1}};
      job.abandoned = [i] { return i == 1; };  // the first of three
      job.done = [&, i](StepJob&) {
        if (i == 4) over.set_value();
      };
      scheduler.submit(std::move(job));
      if (i == 0) body.begun.get_future().wait();
    }
    body.go_on.set_value();
    over.get_future().wait();
  }
  CHECK(body.seen.count(session->body.get()) == 0);
}

}  // namespace
}  // namespace infemeral
