// What the server gives to each and to all: rows, positions, sessions, KV cache, requests that
// wait.
#include <latch>

#include "tests/link_fixture.h"
#include "tests/link_peers.h"

namespace infemeral {

TEST_CASE("bad requests get their own error and the session goes on") {
  Rig rig;
  rig.server_options.max_rows_per_step = 100;
  rig.start();
  const auto link = rig.connect();
  Talk talk(*link, 96, WireDtype::kF32);
  REQUIRE(talk.step(0, 10, Wanted::kLast).ok());
  const auto kept = talk.rows;

  check_says(talk.step(0, 101, Wanted::kLast), absl::StatusCode::kInvalidArgument, "1 to 100");
  check_says(talk.step(11, 1, Wanted::kLast), absl::StatusCode::kInvalidArgument,
             "beyond the cache");
  check_says(talk.step(1999, 2, Wanted::kLast), absl::StatusCode::kInvalidArgument,
             "context of 2000");
  talk.rows = kept;
  CHECK(talk.step(10, 1, Wanted::kLast).ok());
}

TEST_CASE("the newcomer beyond the limit of sessions is turned away, the others go on") {
  Rig rig;
  rig.server_options.max_sessions = 2;
  rig.server_options.max_sessions_per_client = 2;
  rig.start();
  const auto first = rig.connect();
  const auto second = rig.connect();
  Talk a(*first, 96, WireDtype::kF16);
  Talk b(*second, 96, WireDtype::kF16);
  check_says(second->open_session({}).status(), absl::StatusCode::kResourceExhausted,
             "all of its 2 sessions");
  CHECK(rig.server->counters().refused_sessions == 1);
  CHECK(a.step(0, 2, Wanted::kAll).ok());
  CHECK(b.step(0, 2, Wanted::kAll).ok());
  first->close_session(a.session.id);
  CHECK(soon([&] { return rig.server->counters().open_sessions == 1; }));
  CHECK(second->open_session({}).ok());
}

TEST_CASE("one client does not take the sessions of all") {
  Rig rig;
  rig.server_options.max_sessions = 4;
  const Identity other = Identity::generate();
  SECTION("half of them, over all of its connections") {
    rig.server_options.allow.push_back(other.public_key());
    rig.start();
    const auto first = rig.connect();
    const auto second = rig.connect();
    Talk a(*first, 96, WireDtype::kF16);
    Talk b(*second, 96, WireDtype::kF16);
    for (Link* link : {first.get(), second.get()}) {
      check_says(link->open_session({}).status(), absl::StatusCode::kResourceExhausted,
                 "all of the 2 sessions");
    }
    rig.options.identity = &other;
    const auto third = rig.connect();
    Talk c(*third, 96, WireDtype::kF16);
    Talk d(*third, 96, WireDtype::kF16);
    for (Talk* talk : {&a, &b, &c, &d}) CHECK(talk->step(0, 2, Wanted::kAll).ok());
    check_says(third->open_session({}).status(), absl::StatusCode::kResourceExhausted,
               "all of its 4 sessions");
    first->close_session(a.session.id);
    CHECK(soon([&] { return rig.server->counters().open_sessions == 3; }));
    CHECK(second->open_session({}).ok());
  }
  SECTION("all of them, when it is the only one") {
    rig.server_options.allow = {rig.client_identity.public_key(), rig.client_identity.public_key()};
    rig.start();
    const auto link = rig.connect();
    for (int i = 0; i < 4; ++i) CHECK(link->open_session({}).ok());
    CHECK(link->open_session({}).status().code() == absl::StatusCode::kResourceExhausted);
  }
  SECTION("as many as the operator says") {
    rig.server_options.max_sessions_per_client = 3;
    rig.start();
    const auto link = rig.connect();
    for (int i = 0; i < 3; ++i) CHECK(link->open_session({}).ok());
    check_says(link->open_session({}).status(), absl::StatusCode::kResourceExhausted,
               "all of the 3 sessions");
  }
}

TEST_CASE("the step that needs more KV cache than the server has is turned away") {
  Rig rig;
  rig.server_options.max_kv_bytes = 100 * rig.body.info().kv_bytes_per_token + 1;
  rig.start();
  const auto first = rig.connect();
  const auto second = rig.connect();
  Talk a(*first, 96, WireDtype::kF16);
  Talk b(*second, 96, WireDtype::kF16);
  REQUIRE(a.step(0, 60, Wanted::kLast).ok());
  REQUIRE(b.step(0, 40, Wanted::kLast).ok());
  const auto kept = b.rows;
  check_says(b.step(40, 1, Wanted::kLast), absl::StatusCode::kResourceExhausted,
             "no room for 41 positions");
  b.rows = kept;
  check_says(b.step(20, 500, Wanted::kLast), absl::StatusCode::kInvalidArgument,
             "holds 100 positions, not 520");
  b.rows = kept;
  CHECK(rig.server->counters().refused_steps == 2);
  CHECK(rig.server->counters().kv_bytes == 100 * rig.body.info().kv_bytes_per_token);
  // Those who are in go on within what they have, and b's cache is as it was.
  CHECK(b.step(39, 1, Wanted::kAll).ok());
  CHECK(a.step(59, 1, Wanted::kAll).ok());
  CHECK(a.step(0, 10, Wanted::kAll).ok());
  Talk c(*second, 96, WireDtype::kF16);
  CHECK(c.step(0, 1, Wanted::kAll).code() == absl::StatusCode::kResourceExhausted);
  // A session's room comes back with its end.
  first->close_session(a.session.id);
  CHECK(soon([&] { return rig.server->counters().open_sessions == 2; }));
  CHECK(b.step(40, 60, Wanted::kAll).ok());
  CHECK(b.step(100, 1, Wanted::kAll).code() == absl::StatusCode::kInvalidArgument);  // ever
}

TEST_CASE("requests of one connection may be in flight together") {
  Rig rig;
  rig.server_options.max_pending_per_connection = 4;
  rig.start();
  RawClient client(rig.options);
  // More, without waiting, than the server keeps at once.
  constexpr std::uint64_t kRequests = 30;
  for (std::uint64_t i = 1; i <= kRequests; ++i) client.send({i, open_frame(rig.options)});
  client.raw.stream->WritesDone();
  for (std::uint64_t i = 1; i <= kRequests; ++i) {
    const Frame answer = client.receive();
    CHECK(answer.request == i);
    CHECK(std::holds_alternative<OpenedFrame>(answer.kind));
  }
  CHECK(client.raw.ending().ok());
}

TEST_CASE("one envelope does not bring more requests than may wait") {
  // Outlives the rig, whose compute thread may still look at it.
  std::latch leave(1);
  std::atomic<bool> block = false;
  Rig rig;
  rig.server_options.max_pending_per_connection = 4;
  rig.body.before_run = [&] {
    if (block) leave.wait();
  };
  rig.start();
  RawClient client(rig.options);
  client.send({1, open_frame(rig.options)});
  const std::uint64_t session = std::get<OpenedFrame>(client.receive().kind).session.id;
  const auto steps = [&](int count) {
    std::string data;
    for (int i = 0; i < count; ++i) {
      const std::string row(wire_row_bytes(WireDtype::kF16, 96), '\0');
      data += client.seal(
          encode_frame({2, StepFrame{.session = session, .rows = 1, .tensor = {.bytes = row}}}));
    }
    return data;
  };
  SECTION("as many as may wait") {
    client.write(steps(4));
    for (int i = 0; i < 4; ++i) CHECK(std::holds_alternative<OutputFrame>(client.receive().kind));
  }
  SECTION("more than may wait") {
    CHECK(client.ended_by(steps(5)) == grpc::StatusCode::RESOURCE_EXHAUSTED);
    CHECK(rig.body.seen.empty());
  }
  SECTION("more than may wait with those that wait") {
    block = true;
    client.write(steps(3));
    REQUIRE(soon([&] { return rig.server->counters().waiting_steps == 2; }));
    CHECK(client.ended_by(steps(2)) == grpc::StatusCode::RESOURCE_EXHAUSTED);
  }
  leave.count_down();
}

TEST_CASE("a large frame may come late, after the last session was closed") {
  Rig rig;
  rig.start();
  RawClient client(rig.options);
  client.send({1, open_frame(rig.options)});
  const std::uint64_t session = std::get<OpenedFrame>(client.receive().kind).session.id;
  client.send({2, CloseFrame{session}});
  const std::string rows(20 * wire_row_bytes(WireDtype::kF16, 96), '\0');
  client.send({3, StepFrame{.session = session, .rows = 20, .tensor = {.bytes = rows}}});
  const Frame answer = client.receive();
  REQUIRE(std::holds_alternative<ErrorFrame>(answer.kind));
  CHECK(std::get<ErrorFrame>(answer.kind).status.code() == absl::StatusCode::kNotFound);
}

TEST_CASE("server options that cannot be served are refused") {
  Rig rig;
  const auto refused = [&] { return BodyServer::start(rig.body, rig.server_options).status(); };
  SECTION("no identity") {
    rig.server_options.identity = nullptr;
    check_says(refused(), absl::StatusCode::kInvalidArgument, "identity");
  }
  SECTION("nobody allowed") {
    rig.server_options.allow.clear();
    check_says(refused(), absl::StatusCode::kInvalidArgument, "public key");
  }
  SECTION("no rows") {
    rig.server_options.max_rows_per_step = 0;
    check_says(refused(), absl::StatusCode::kInvalidArgument, "max_rows_per_step");
  }
  SECTION("no sessions") {
    rig.server_options.max_sessions = 0;
    check_says(refused(), absl::StatusCode::kInvalidArgument, "max_sessions");
  }
  SECTION("a KV cache without room for one position") {
    rig.server_options.max_kv_bytes = rig.body.info().kv_bytes_per_token - 1;
    check_says(refused(), absl::StatusCode::kInvalidArgument, "max_kv_bytes");
  }
  SECTION("a port that is taken") {
    rig.start();
    rig.server_options.listen = "127.0.0.1:" + std::to_string(rig.server->port());
    check_says(refused(), absl::StatusCode::kUnavailable, "cannot listen on 127.0.0.1:");
  }
  SECTION("an address of nobody") {
    rig.server_options.listen = "192.0.2.1:0";
    check_says(refused(), absl::StatusCode::kUnavailable, "cannot listen on");
    for (const char* malformed :
         {"127.0.0.1", ":50051", "127.0.0.1:", "127.0.0.1:http", "::1:65536"}) {
      rig.server_options.listen = malformed;
      check_says(refused(), absl::StatusCode::kInvalidArgument, "not of the form host:port");
    }
  }
}

}  // namespace infemeral
