// Client and server over a real connection: rows and their answers, ciphers, models that fit; links
// that end, time out or are cut; many clients at once.
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>

#include <chrono>
#include <deque>
#include <filesystem>
#include <latch>
#include <numeric>

#include "net/client_stream.h"
#include "tests/link_fixture.h"

namespace infemeral {
namespace {

constexpr Wanted kWanted[] = {Wanted::kNone, Wanted::kLast, Wanted::kAll};

// One message to a method whose messages this test has no code for, and the first one back.
std::string ask(const std::string& server, const std::string& method, const std::string& request) {
  const auto channel = grpc::CreateChannel(server, grpc::InsecureChannelCredentials());
  grpc::GenericStub stub(channel);
  grpc::ClientContext context;
  grpc::CompletionQueue queue;
  void* tag = nullptr;
  bool ok = false;
  const auto call = stub.PrepareCall(&context, method, &queue);
  call->StartCall(nullptr);
  REQUIRE(queue.Next(&tag, &ok));
  const grpc::Slice slice(request);
  call->Write(grpc::ByteBuffer(&slice, 1), nullptr);
  REQUIRE(queue.Next(&tag, &ok));
  grpc::ByteBuffer answer;
  call->Read(&answer, nullptr);
  REQUIRE(queue.Next(&tag, &ok));
  std::string text;
  if (ok) {
    std::vector<grpc::Slice> slices;
    REQUIRE(answer.Dump(&slices).ok());
    for (const grpc::Slice& part : slices) {
      text.append(reinterpret_cast<const char*>(part.begin()), part.size());
    }
  }
  context.TryCancel();
  grpc::Status status;
  call->Finish(&status, nullptr);
  REQUIRE(queue.Next(&tag, &ok));
  queue.Shutdown();
  return text;
}

}  // namespace

TEST_CASE("rows go through the channel and their answers come back, in every dtype") {
  Rig rig;
  rig.start();
  const auto link = rig.connect();
  CHECK(link->cipher() == cipher_suite_name(cipher_suite_available(CipherSuite::kAesGcm)
                                                ? CipherSuite::kAesGcm
                                                : CipherSuite::kChaChaPoly));
  std::uint64_t steps = 0, up = 0, down = 0;
  for (WireDtype dtype : kDtypes) {
    for (Wanted wanted : kWanted) {
      Talk talk(*link, 96, dtype);
      CHECK(talk.session.hidden_size == 96);
      CHECK(talk.session.max_context == 2000);
      CHECK(talk.session.max_rows == 600);
      CHECK(talk.session.body == "known body");
      for (auto [start, rows] : std::vector<std::pair<std::uint32_t, std::uint32_t>>{
               {0, 1}, {1, 1}, {2, 37}, {0, 600}, {600, 600}, {1200, 1}, {300, 2}, {0, 3}}) {
        const absl::Status status = talk.step(start, rows, wanted);
        INFO(status);
        REQUIRE(status.ok());
        ++steps;
        up += rows * wire_row_bytes(dtype, 96);
        down += talk.reply.tensor.size();
      }
      CHECK(talk.times.encode_ms > 0);
      CHECK(talk.times.encrypt_ms > 0);
      CHECK(talk.times.network_ms >= 0);
      CHECK(talk.times.body_ms > 0);
      CHECK(talk.times.decrypt_ms > 0);
      CHECK(talk.times.decode_ms > 0);
      link->close_session(talk.session.id);
    }
  }
  const LinkCounters counters = link->counters();
  CHECK(counters.steps == steps);
  CHECK(counters.handshakes == 1);
  CHECK(counters.tensor_bytes_up == up);
  CHECK(counters.tensor_bytes_down == down);
  CHECK(counters.packed_bytes_up > 0);
  CHECK(counters.packed_bytes_up <= up);
  CHECK(counters.packed_bytes_down > 0);
  CHECK(counters.packed_bytes_down <= down);
  CHECK(counters.packed_bytes_up < counters.bytes_up);
  CHECK(counters.bytes_up > up);
  CHECK(counters.bytes_up < up + steps * 300 + up / 1000);
  CHECK(counters.bytes_down > down / 2);  // answers that share a large sum compress a little
  const BodyServerCounters served = rig.server->counters();
  CHECK(served.steps == steps);
  CHECK(served.failed_steps == 0);
  CHECK(served.refused_sessions == 0);
  const auto& latency = served.step_latency.counts;
  CHECK(std::accumulate(latency.begin(), latency.end(), std::uint64_t{0}) == steps);
  CHECK(served.step_latency.sum_seconds > 0);
  CHECK(soon([&] { return rig.server->counters().open_sessions == 0; }));
}

TEST_CASE("a step that needs many envelopes arrives whole") {
  Rig rig(4096);
  rig.start();
  const auto link = rig.connect();
  Talk talk(*link, 4096, WireDtype::kF32);
  for (std::uint32_t rows : {15, 16, 17, 64, 600}) {
    const absl::Status status = talk.step(0, rows, Wanted::kAll);
    INFO(rows << " " << status);
    REQUIRE(status.ok());
  }
}

TEST_CASE("rows that repeat travel compressed") {
  Rig rig(1024);
  rig.start();
  const auto link = rig.connect();
  const auto session = link->open_session({});
  REQUIRE(session.ok());
  const std::vector<std::byte> zeros(64 * wire_row_bytes(WireDtype::kF32, 1024));
  StepReply reply;
  PhaseTimes times;
  REQUIRE(link->step({.session = session->id,
                      .rows = 64,
                      .dtype = WireDtype::kF32,
                      .tensor = zeros,
                      .wanted = Wanted::kAll},
                     {}, reply, times)
              .ok());
  CHECK(reply.tensor == zeros);
  CHECK(link->counters().bytes_up < zeros.size() / 50);
  CHECK(link->counters().bytes_down < zeros.size() / 50);
}

TEST_CASE("both ciphers work, and the client falls back to what the server has") {
  for (CipherSuite suite : {CipherSuite::kAesGcm, CipherSuite::kChaChaPoly}) {
    if (!cipher_suite_available(suite)) {
      WARN("skipped " << cipher_suite_name(suite) << ": this processor cannot do it");
      continue;
    }
    Rig rig;
    SECTION("forced by the client: " + cipher_suite_name(suite)) {
      rig.options.force_cipher = suite;
      rig.start();
      const auto link = rig.connect();
      CHECK(link->cipher() == cipher_suite_name(suite));
      Talk talk(*link, 96, WireDtype::kF16);
      CHECK(talk.step(0, 5, Wanted::kAll).ok());
    }
    SECTION("the only one of the server: " + cipher_suite_name(suite)) {
      rig.server_options.ciphers = {suite};
      rig.start();
      const auto link = rig.connect();
      CHECK(link->cipher() == cipher_suite_name(suite));
      CHECK(link->counters().handshakes == 1);
      Talk talk(*link, 96, WireDtype::kF16);
      CHECK(talk.step(0, 5, Wanted::kAll).ok());
    }
    SECTION("not what the client asks for: " + cipher_suite_name(suite)) {
      rig.server_options.ciphers = {suite};
      rig.start();
      rig.options.force_cipher =
          suite == CipherSuite::kAesGcm ? CipherSuite::kChaChaPoly : CipherSuite::kAesGcm;
      if (!cipher_suite_available(*rig.options.force_cipher)) return;
      check_says(connect_link(rig.options).status(), absl::StatusCode::kFailedPrecondition,
                 "does not accept");
    }
  }
}

TEST_CASE("models that do not belong together are named at Open, and the link survives") {
  Rig rig;
  rig.start();
  SECTION("another model") {
    rig.options.model_fingerprint[31] ^= 1;
    const auto link = rig.connect();
    check_says(link->open_session({}).status(), absl::StatusCode::kFailedPrecondition,
               "different models");
    check_says(link->open_session({}).status(), absl::StatusCode::kFailedPrecondition,
               "different models");
  }
  SECTION("another cloak") {
    rig.options.cloak_commitment[0] ^= 1;
    const auto link = rig.connect();
    check_says(link->open_session({}).status(), absl::StatusCode::kFailedPrecondition,
               "different cloaks");
  }
  SECTION("another size") {
    rig.options.hidden_size = 64;
    const auto link = rig.connect();
    check_says(link->open_session({}).status(), absl::StatusCode::kFailedPrecondition,
               "hidden size 64");
  }
  CHECK(rig.body.sessions == 0);
}

TEST_CASE("sessions end with their connection") {
  Rig rig;
  rig.start();
  {
    const auto link = rig.connect();
    Talk a(*link, 96, WireDtype::kF16);
    Talk b(*link, 96, WireDtype::kF16);
    CHECK(rig.server->counters().open_sessions == 2);
  }
  CHECK(soon([&] { return rig.server->counters().open_sessions == 0; }));
  CHECK(soon([&] { return rig.server->counters().open_connections == 0; }));
  CHECK(rig.body.sessions == 0);
}

TEST_CASE("a server that is not there") {
  Rig rig;
  rig.options.server = "127.0.0.1:1";
  check_says(connect_link(rig.options).status(), absl::StatusCode::kUnavailable,
             "cannot reach 127.0.0.1:1: connection refused; is engine_serve running there?");
  rig.options.server = "name.invalid:5000";
  check_says(connect_link(rig.options).status(), absl::StatusCode::kUnavailable,
             "cannot reach name.invalid:5000: no ");  // "such host", or "name server"
  for (const char* address :
       {"", "host", ":50", "host:", "::1:5000", "fe80::1:50051", "127.0.0.1:99999", "127.0.0.1:0",
        "host:http", "host:-1", "[::1]:65536"}) {
    rig.options.server = address;
    check_says(connect_link(rig.options).status(), absl::StatusCode::kInvalidArgument, "host:port");
  }
}

TEST_CASE("a stop token ends a step and gives the link up") {
  // Outlives the rig, whose compute thread may still look at it.
  std::latch entered(1), leave(1);
  Rig rig;
  rig.body.before_run = [&] {
    if (!entered.try_wait()) {
      entered.count_down();
      leave.wait();
    }
  };
  rig.start();
  const auto link = rig.connect();
  const auto session = link->open_session({});
  REQUIRE(session.ok());
  const std::vector<std::byte> wire(wire_row_bytes(WireDtype::kF16, 96));
  const StepRequest request{
      .session = session->id, .rows = 1, .dtype = WireDtype::kF16, .tensor = wire};
  StepReply reply;
  PhaseTimes times;

  // Stopped before anything was sent: only this call is refused.
  std::stop_source early;
  early.request_stop();
  CHECK(link->step(request, early.get_token(), reply, times).code() ==
        absl::StatusCode::kCancelled);
  CHECK(rig.server->counters().steps == 0);

  std::stop_source stop;
  std::thread stopper([&] {
    entered.wait();
    stop.request_stop();
  });
  CHECK(link->step(request, stop.get_token(), reply, times).code() == absl::StatusCode::kCancelled);
  stopper.join();
  const std::string given_up = "the connection was given up after a cancellation; connect again";
  check_says(link->step(request, {}, reply, times), absl::StatusCode::kUnavailable, given_up);
  check_says(link->open_session({}).status(), absl::StatusCode::kUnavailable, given_up);
  leave.count_down();
  CHECK(soon([&] { return rig.server->counters().open_sessions == 0; }));
}

TEST_CASE("a link that looks for its answers takes them whenever they come") {
  std::latch leave(1);
  Rig rig;
  std::atomic<int> wait_us = 0;
  rig.body.before_run = [&] {
    if (wait_us < 0) return leave.wait();
    std::this_thread::sleep_for(std::chrono::microseconds(wait_us));
  };
  rig.options.spin = true;
  rig.options.step_timeout = milliseconds(300);
  rig.start();
  const auto link = rig.connect();
  Talk talk(*link, 96, WireDtype::kF16);
  // About when the one before came, much sooner, much later; beyond what it stays awake for.
  for (int us : {0, 3000, 3100, 2900, 100, 20000, 0, 60000, 70000, 40000, 40000}) {
    wait_us = us;
    const auto status = talk.step(static_cast<std::uint32_t>(talk.rows.size()), 1, Wanted::kLast);
    CAPTURE(us, status.ToString());
    REQUIRE(status.ok());
  }
  wait_us = -1;
  check_says(talk.step(11, 1, Wanted::kLast), absl::StatusCode::kDeadlineExceeded, "300 ms");
  leave.count_down();
}

TEST_CASE("a step that takes too long ends at its deadline") {
  // Outlives the rig, whose compute thread may still look at it.
  std::latch leave(1);
  Rig rig;
  rig.body.before_run = [&] { leave.wait(); };
  rig.options.step_timeout = milliseconds(200);
  rig.start();
  const auto link = rig.connect();
  Talk talk(*link, 96, WireDtype::kF16);
  const auto start = std::chrono::steady_clock::now();
  check_says(talk.step(0, 1, Wanted::kLast), absl::StatusCode::kDeadlineExceeded, "200 ms");
  CHECK(std::chrono::steady_clock::now() - start < milliseconds(3000));
  check_says(talk.step(0, 1, Wanted::kLast), absl::StatusCode::kDeadlineExceeded, "200 ms");
  leave.count_down();
}

TEST_CASE("why a call was cancelled is known after the one who cancelled it has gone") {
  Rig rig;
  rig.start();
  LinkCounters counters;
  ClientStream stream(rig.options, Identity::from_secret(rig.client_identity.secret_key().copy()),
                      counters);
  REQUIRE(stream.connect({}).ok());
  // The first interrupt cancels the call and goes unnoticed, as submit()'s does when a step's time
  // is over just after its last byte was written.
  PhaseTimes times;
  SECTION("a deadline") {
    {
      const ClientStream::Interrupt sending(stream, milliseconds(1), {});
      std::this_thread::sleep_for(milliseconds(100));
    }
    ClientStream::Interrupt waiting(stream, rig.options.step_timeout, {});
    check_says(stream.receive(kMaxFrameOverhead, waiting, times).status(),
               absl::StatusCode::kDeadlineExceeded, "no answer from " + rig.options.server);
    check_says(stream.error(), absl::StatusCode::kDeadlineExceeded, "no answer");
  }
  SECTION("a stop") {
    {
      std::stop_source stop;
      const ClientStream::Interrupt sending(stream, rig.options.step_timeout, stop.get_token());
      stop.request_stop();
    }
    ClientStream::Interrupt waiting(stream, rig.options.step_timeout, {});
    check_says(stream.receive(kMaxFrameOverhead, waiting, times).status(),
               absl::StatusCode::kUnavailable, "given up after a cancellation; connect again");
  }
  REQUIRE(stream.connect({}).ok());
  CHECK(stream.error().ok());
}

TEST_CASE("a line that is cut or frozen in the middle") {
  Rig rig;
  rig.start();
  Relay relay(rig.server->port());
  rig.use_port(relay.port());
  rig.options.step_timeout = milliseconds(1000);
  const auto link = rig.connect();
  Talk talk(*link, 96, WireDtype::kF16);
  REQUIRE(talk.step(0, 5, Wanted::kAll).ok());
  SECTION("cut") {
    relay.cut();
    check_says(talk.step(5, 1, Wanted::kLast), absl::StatusCode::kUnavailable, "connection to");
    check_says(talk.step(5, 1, Wanted::kLast), absl::StatusCode::kUnavailable, "connection to");
    CHECK(soon([&] { return rig.server->counters().open_sessions == 0; }));
  }
  SECTION("frozen") {
    relay.freeze();
    check_says(talk.step(5, 1, Wanted::kLast), absl::StatusCode::kDeadlineExceeded, "1000 ms");
  }
}

TEST_CASE("a server that shuts down") {
  // Outlives the rig, whose compute thread may still look at it.
  std::latch entered(1), leave(1);
  std::atomic<bool> block = false;
  Rig rig;
  rig.body.before_run = [&] {
    if (block) {
      entered.count_down();
      leave.wait();
      block = false;
    }
  };
  rig.start();
  const auto link = rig.connect();
  Talk talk(*link, 96, WireDtype::kF16);
  REQUIRE(talk.step(0, 5, Wanted::kAll).ok());

  SECTION("answers what is pending") {
    block = true;
    std::thread shutter([&] {
      entered.wait();
      std::thread unblock([&] {
        std::this_thread::sleep_for(milliseconds(100));
        leave.count_down();
      });
      rig.server->shutdown(milliseconds(10000));
      unblock.join();
    });
    const absl::Status status = talk.step(5, 3, Wanted::kAll);
    INFO(status);
    CHECK(status.ok());
    shutter.join();
    check_says(talk.step(8, 1, Wanted::kLast), absl::StatusCode::kUnavailable, "shutting down");
  }
  SECTION("or not, when the time is over") {
    block = true;
    std::thread shutter([&] {
      entered.wait();
      std::thread unblock([&] {
        std::this_thread::sleep_for(milliseconds(300));
        leave.count_down();
      });
      rig.server->shutdown(milliseconds(0));
      unblock.join();
    });
    CHECK(talk.step(5, 3, Wanted::kAll).code() == absl::StatusCode::kUnavailable);
    shutter.join();
  }
  CHECK(rig.server->counters().open_connections == 0);
  CHECK(rig.server->counters().open_sessions == 0);
  rig.server->shutdown(milliseconds(0));  // once more does nothing
  check_says(connect_link(rig.options).status(), absl::StatusCode::kUnavailable,
             "connection refused");
}

TEST_CASE("many clients with many sessions at once get their own answers") {
  Rig rig;
  rig.start();
  constexpr int kClients = 6, kSessions = 3, kSteps = 30;
  std::vector<std::unique_ptr<Link>> links;
  std::vector<std::vector<Talk>> talks(kClients);
  for (int i = 0; i < kClients; ++i) {
    links.push_back(rig.connect());
    for (int j = 0; j < kSessions; ++j) talks[i].emplace_back(*links[i], 96, kDtypes[(i + j) % 3]);
  }
  std::mutex mutex;
  std::vector<std::string> errors;
  std::vector<std::thread> threads;
  for (int i = 0; i < kClients; ++i) {
    threads.emplace_back([&, i] {
      std::mt19937 rng(std::random_device{}());
      for (int step = 0; step < kSteps; ++step) {
        Talk& talk = talks[i][rng() % kSessions];
        const auto start = static_cast<std::uint32_t>(rng() % (talk.rows.size() + 1));
        const auto status = talk.step(start, 1 + rng() % 20, kWanted[rng() % 3]);
        if (status.ok()) continue;
        const std::lock_guard lock(mutex);
        errors.push_back(status.ToString());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(errors == std::vector<std::string>{});
  CHECK(!rig.body.overlapped);
  CHECK(rig.server->counters().steps == kClients * kSteps);
  CHECK(rig.server->counters().open_sessions == kClients * kSessions);
}

TEST_CASE("steps that wait are run together") {
  // Outlives the rig, whose compute thread may still look at it.
  std::latch leave(1);
  std::atomic<bool> blocked = false;
  std::atomic<int> wrong = 0;
  Rig rig;
  rig.body.before_run = [&] {
    if (!blocked.exchange(true)) leave.wait();
  };
  rig.start();
  constexpr int kClients = 5;
  std::vector<std::unique_ptr<Link>> links;
  std::vector<Talk> talks;
  for (int i = 0; i < kClients; ++i) {
    links.push_back(rig.connect());
    talks.emplace_back(*links[i], 96, WireDtype::kF16);
  }
  std::vector<std::thread> threads;
  threads.emplace_back([&] { wrong += !talks[0].step(0, 1, Wanted::kLast).ok(); });
  REQUIRE(soon([&] { return blocked.load(); }));
  for (int i = 1; i < kClients; ++i) {
    threads.emplace_back([&, i] { wrong += !talks[i].step(0, 1, Wanted::kLast).ok(); });
  }
  CHECK(soon([&] { return rig.server->counters().waiting_steps == kClients - 1; }));
  leave.count_down();
  for (std::thread& thread : threads) thread.join();
  CHECK(wrong == 0);
  CHECK(rig.body.largest_batch == kClients - 1);
}

TEST_CASE("health checks and reflection answer") {
  Rig rig;
  rig.start();
  // HealthCheckResponse{status: SERVING}, and the list of services.
  CHECK(ask(rig.options.server, "/grpc.health.v1.Health/Check", "") == "\x08\x01");
  const std::string services =
      ask(rig.options.server, "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
          std::string("\x3a\x00", 2));
  CHECK(services.find("infemeral.v1.SplitInference") != std::string::npos);
  CHECK(services.find("grpc.health.v1.Health") != std::string::npos);
  // A server of ours is told from other gRPC servers by its method, not by its port.
  CHECK(ask(rig.options.server, "/infemeral.v1.SplitInference/Other", "").empty());
}

TEST_CASE(
    "strangers who hold reflection streams cost the server few threads, and clients nothing") {
  const auto threads = [] {
    const std::filesystem::directory_iterator tasks("/proc/self/task");
    return std::distance(begin(tasks), end(tasks));
  };
  Rig rig;
  rig.start();
  constexpr std::size_t kStreams = 30;  // of the 32 that a connection may have
  const auto channel = grpc::CreateChannel(rig.options.server, grpc::InsecureChannelCredentials());
  grpc::GenericStub stub(channel);
  grpc::CompletionQueue queue;
  std::deque<grpc::ClientContext> contexts;
  std::vector<std::unique_ptr<grpc::GenericClientAsyncReaderWriter>> calls;
  const auto before = threads();
  void* tag = nullptr;
  bool ok = false;
  for (std::size_t i = 0; i < kStreams; ++i) {
    calls.push_back(
        stub.PrepareCall(&contexts.emplace_back(),
                         "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", &queue));
    calls.back()->StartCall(nullptr);
    REQUIRE(queue.Next(&tag, &ok));
    const grpc::Slice slice(std::string("\x3a\x00", 2));
    calls.back()->Write(grpc::ByteBuffer(&slice, 1), nullptr);
    REQUIRE(queue.Next(&tag, &ok));
  }
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  CHECK(threads() - before < 16);
  const auto link = rig.connect();
  Talk talk(*link, rig.body.info().hidden_size, WireDtype::kF16);
  CHECK(talk.step(0, 3, Wanted::kLast).ok());
  for (std::size_t i = 0; i < kStreams; ++i) {
    contexts[i].TryCancel();
    grpc::Status status;
    calls[i]->Finish(&status, nullptr);
    REQUIRE(queue.Next(&tag, &ok));
  }
  queue.Shutdown();
}

}  // namespace infemeral
