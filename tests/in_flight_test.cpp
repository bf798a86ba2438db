// Several steps of one session on their way at once.
#include <deque>
#include <latch>

#include "tests/link_fixture.h"
#include "tests/test_random.h"

namespace infemeral {
namespace {

constexpr std::uint32_t kHidden = 96;

// A conversation that sends before it has been answered, and knows all answers.
class Stream {
 public:
  explicit Stream(Link& link) : link_(link) {
    auto opened = link_.open_session({});
    REQUIRE(opened.ok());
    session = *opened;
  }

  absl::Status submit(std::uint32_t count, Wanted wanted) {
    const std::size_t row_bytes = wire_row_bytes(WireDtype::kF32, kHidden);
    std::vector<std::byte> wire(count * row_bytes);
    const auto start = static_cast<std::uint32_t>(rows_.size());
    for (std::size_t i = 0; i < count; ++i) {
      std::vector<float> row(kHidden);
      for (float& x : row) x = normal();
      encode_wire_row(WireDtype::kF32, row, wire.data() + i * row_bytes);
      rows_.push_back(std::move(row));
    }
    const absl::Status status = link_.submit({.session = session.id,
                                              .start_pos = start,
                                              .rows = count,
                                              .dtype = WireDtype::kF32,
                                              .tensor = wire,
                                              .wanted = wanted},
                                             {}, times_);
    // The tensor is the caller's again.
    std::fill(wire.begin(), wire.end(), std::byte{0xFF});
    if (status.ok()) out_.emplace_back(rows_.size(), output_rows(wanted, count));
    return status;
  }

  absl::Status await() {
    StepReply reply;
    const absl::Status status = link_.await({}, reply, times_);
    const auto [end, back] = out_.front();
    out_.pop_front();
    if (!status.ok()) return status;
    CHECK(reply.kv_len == end);
    REQUIRE(reply.rows == back);
    const std::size_t row_bytes = wire_row_bytes(WireDtype::kF32, kHidden);
    REQUIRE(reply.tensor.size() == back * row_bytes);
    for (std::size_t i = 0; i < back; ++i) {
      std::vector<std::byte> expected(row_bytes);
      encode_wire_row(WireDtype::kF32, known_answer(rows_, end - back + i), expected.data());
      CHECK(std::equal(expected.begin(), expected.end(), reply.tensor.begin() + i * row_bytes));
    }
    return status;
  }

  std::size_t out() const { return out_.size(); }
  SessionInfo session;

 private:
  Link& link_;
  std::vector<std::vector<float>> rows_;
  std::deque<std::pair<std::size_t, std::size_t>> out_;  // end position, rows back
  PhaseTimes times_;
};

}  // namespace

TEST_CASE("steps on their way at once are answered in their order") {
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  Rig rig(kHidden);
  rig.start();
  const auto link = rig.connect();
  for (int round = 0; round < 10; ++round) {
    Stream stream(*link);
    for (int i = 0; i < 60; ++i) {
      const bool send = stream.out() == 0 || (stream.out() < Link::kMaxInFlight && random_index(2));
      const auto wanted = static_cast<Wanted>(random_index(3));
      const auto count = static_cast<std::uint32_t>(1 + random_index(30));
      const absl::Status status = send ? stream.submit(count, wanted) : stream.await();
      INFO(status);
      REQUIRE(status.ok());
    }
    while (stream.out() > 0) REQUIRE(stream.await().ok());
    link->close_session(stream.session.id);
  }
  StepReply none;
  PhaseTimes times;
  CHECK(absl::IsInternal(link->await({}, none, times)));
}

TEST_CASE("more steps than a link takes at once are refused, those on their way are answered") {
  Rig rig(kHidden);
  rig.start();
  const auto link = rig.connect();
  Stream stream(*link);
  for (std::uint32_t i = 0; i < Link::kMaxInFlight; ++i) {
    REQUIRE(stream.submit(2, Wanted::kAll).ok());
  }
  CHECK(absl::IsInvalidArgument(stream.submit(1, Wanted::kLast)));
  while (stream.out() > 0) REQUIRE(stream.await().ok());
}

TEST_CASE("an error that overtakes the answers before it stays with its own step") {
  // Outlives the rig, whose compute thread may still look at it.
  std::latch leave(1);
  Rig rig(kHidden);
  rig.server_options.max_kv_bytes = 10 * sizeof(float);  // ten positions
  rig.body.before_run = [&] { leave.wait(); };
  rig.start();
  const auto link = rig.connect();
  Stream stream(*link);
  REQUIRE(stream.submit(8, Wanted::kAll).ok());   // held up in the body
  REQUIRE(stream.submit(8, Wanted::kLast).ok());  // refused while it is
  std::thread opener([&] {
    // By now the refusal has left the server, or will have before the answer.
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    leave.count_down();
  });
  CHECK(stream.await().ok());
  CHECK(absl::IsInvalidArgument(stream.await()));
  opener.join();
  // The link goes on.
  CHECK(link->open_session({}).ok());
}

TEST_CASE("a line that breaks answers every step that was on its way") {
  std::latch leave(1);
  Rig rig(kHidden);
  rig.body.before_run = [&] { leave.wait(); };
  rig.start();
  Relay relay(rig.server->port());
  rig.use_port(relay.port());
  const auto link = rig.connect();
  Stream stream(*link);
  for (int i = 0; i < 3; ++i) REQUIRE(stream.submit(4, Wanted::kAll).ok());
  relay.cut();
  for (int i = 0; i < 3; ++i) CHECK(absl::IsUnavailable(stream.await()));
  leave.count_down();
}

}  // namespace infemeral
