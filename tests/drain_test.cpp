// A running server: told to end, given another list of clients, left alone on an idle line.
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>

#include <cstdlib>
#include <latch>

#include "tests/link_fixture.h"

namespace infemeral {
namespace {

using std::chrono::milliseconds;

// grpc.health.v1.Health/Check for the whole server: the answer's bytes, empty when there is none.
std::string health(const std::string& server) {
  grpc::GenericStub stub(grpc::CreateChannel(server, grpc::InsecureChannelCredentials()));
  grpc::ClientContext context;
  grpc::CompletionQueue queue;
  const grpc::ByteBuffer request(nullptr, 0);
  grpc::ByteBuffer answer;
  grpc::Status status;
  const auto call =
      stub.PrepareUnaryCall(&context, "/grpc.health.v1.Health/Check", request, &queue);
  call->StartCall();
  call->Finish(&answer, &status, nullptr);
  void* tag = nullptr;
  bool ok = false;
  queue.Next(&tag, &ok);
  queue.Shutdown();
  std::string text;
  std::vector<grpc::Slice> slices;
  if (status.ok() && answer.Dump(&slices).ok()) {
    for (const grpc::Slice& part : slices) {
      text.append(reinterpret_cast<const char*>(part.begin()), part.size());
    }
  }
  return text;
}

const std::string kServing = "\x08\x01", kNotServing = "\x08\x02";

}  // namespace

TEST_CASE("a server that drains says so to health checks and newcomers, and answers what it owes") {
  // Outlives the rig, whose compute thread may still look at it.
  std::latch entered(1), leave(1);
  Rig rig;
  rig.body.before_run = [&] {
    entered.count_down();
    leave.wait();
  };
  rig.start();
  const auto link = rig.connect();
  Talk talk(*link, 96, WireDtype::kF16);
  CHECK(health(rig.options.server) == kServing);

  std::thread shutter([&] {
    entered.wait();
    rig.server->shutdown(milliseconds(20000));
  });
  std::thread newcomer([&] {
    entered.wait();
    std::string said;
    for (int i = 0; i < 500 && said != kNotServing; ++i) {
      said = health(rig.options.server);
      std::this_thread::sleep_for(milliseconds(5));
    }
    const absl::Status refused = connect_link(rig.options).status();
    leave.count_down();
    CHECK(said == kNotServing);
    INFO(refused);
    CHECK(absl::IsUnavailable(refused));
    CHECK(std::string(refused.message()).find("shutting down") != std::string::npos);
  });
  const auto begin = std::chrono::steady_clock::now();
  const absl::Status status = talk.step(0, 3, Wanted::kAll);
  newcomer.join();
  shutter.join();
  INFO(status);
  CHECK(status.ok());
  // Not the whole grace period: it ends with the last answer.
  CHECK(std::chrono::steady_clock::now() - begin < milliseconds(15000));
  CHECK(health(rig.options.server).empty());
}

TEST_CASE("the list of clients is replaced while connections go on") {
  Rig rig;
  const Identity other = Identity::generate();
  rig.server_options.max_sessions = 4;
  rig.server_options.allow = {rig.client_identity.public_key()};
  rig.start();
  const auto link = rig.connect();
  Talk first(*link, 96, WireDtype::kF16), second(*link, 96, WireDtype::kF16);
  REQUIRE(first.step(0, 3, Wanted::kAll).ok());

  ClientLinkOptions others = rig.options;
  others.identity = &other;
  CHECK(absl::IsPermissionDenied(connect_link(others).status()));
  CHECK(absl::IsInvalidArgument(rig.server->set_allow({})));
  CHECK(connect_link(rig.options).ok());

  // Two clients: each may have half of the sessions, and this one has them.
  REQUIRE(rig.server->set_allow({rig.client_identity.public_key(), other.public_key()}).ok());
  CHECK(absl::IsResourceExhausted(link->open_session({}).status()));
  auto joined = connect_link(others);
  REQUIRE(joined.ok());
  Talk third(**joined, 96, WireDtype::kF16);
  CHECK(third.step(0, 2, Wanted::kAll).ok());

  // Gone from the list: what is open goes on, a new connection is refused.
  REQUIRE(rig.server->set_allow({other.public_key()}).ok());
  CHECK(first.step(3, 1, Wanted::kAll).ok());
  CHECK(second.step(0, 1, Wanted::kAll).ok());
  CHECK(absl::IsPermissionDenied(connect_link(rig.options).status()));
}

// Hidden: takes INFEMERAL_IDLE_SECONDS, ten minutes if it is not set.
TEST_CASE("an idle line is kept up and nobody is accused of too many pings", "[.idle]") {
  const char* given = std::getenv("INFEMERAL_IDLE_SECONDS");
  const std::chrono::seconds idle(given != nullptr ? std::atoi(given) : 600);
  Rig rig;
  rig.start();
  const auto link = rig.connect();
  Talk talk(*link, 96, WireDtype::kF16);
  REQUIRE(talk.step(0, 3, Wanted::kAll).ok());
  std::this_thread::sleep_for(idle);
  const absl::Status status = talk.step(3, 1, Wanted::kAll);
  INFO(status);
  CHECK(status.ok());
  CHECK(rig.server->counters().connections == 1);
}

}  // namespace infemeral
