#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>

#include <chrono>
#include <cstring>
#include <latch>
#include <mutex>
#include <set>
#include <variant>

#include "net/bytes.h"
#include "net/channel.h"
#include "net/frames.h"
#include "proto/split_inference.grpc.pb.h"
#include "tests/link_fixture.h"

namespace infemeral {
namespace {

using std::chrono::milliseconds;
constexpr WireDtype kDtypes[] = {WireDtype::kF32, WireDtype::kF16, WireDtype::kI8};
constexpr Wanted kWanted[] = {Wanted::kNone, Wanted::kLast, Wanted::kAll};

// Waits for what another thread does soon; false after ten seconds.
bool soon(const std::function<bool()>& condition) {
  for (int i = 0; i < 1000; ++i) {
    if (condition()) return true;
    std::this_thread::sleep_for(milliseconds(10));
  }
  return false;
}

std::string text_of(const absl::Status& status) {
  return std::string(status.message());
}

void check_says(const absl::Status& status, absl::StatusCode code, const std::string& words) {
  INFO(status);
  CHECK(status.code() == code);
  CHECK(text_of(status).find(words) != std::string::npos);
}

template <std::size_t N>
std::string raw(const std::array<std::uint8_t, N>& bytes) {
  return std::string(bytes.begin(), bytes.end());
}

// The stream without the client's manners.
struct RawStream {
  explicit RawStream(const std::string& server)
      : stub(v1::SplitInference::NewStub(
            grpc::CreateChannel(server, grpc::InsecureChannelCredentials()))),
        stream(stub->Session(&context)) {}
  // What the server ends the stream with.
  grpc::Status ending() {
    v1::Envelope envelope;
    while (stream->Read(&envelope)) {
    }
    return stream->Finish();
  }

  grpc::ClientContext context;
  std::unique_ptr<v1::SplitInference::Stub> stub;
  std::unique_ptr<grpc::ClientReaderWriter<v1::Envelope, v1::Envelope>> stream;
};

v1::Envelope hello(CipherSuite suite, const std::string& data) {
  v1::Envelope envelope;
  envelope.mutable_hello()->set_version(kProtocolVersion);
  envelope.mutable_hello()->set_cipher(static_cast<v1::Cipher>(suite));
  envelope.set_data(data);
  return envelope;
}

OpenFrame open_frame(const Rig& rig) {
  return {rig.options.model_fingerprint, rig.options.cloak_commitment, 96};
}

// A client that completes the handshake and then says what it likes.
struct RawClient {
  explicit RawClient(const Rig& rig) : raw(rig.options.server) {
    const CipherSuite suite = CipherSuite::kChaChaPoly;
    const std::string prologue = noise_prologue(kProtocolVersion, suite);
    auto handshake = *NoiseHandshake::initiator(suite, bytes_of(prologue), rig.client_identity,
                                                rig.options.server_key);
    REQUIRE(handshake.write_message({}, first).ok());
    raw.stream->Write(hello(suite, first));
    v1::Envelope answer;
    REQUIRE(raw.stream->Read(&answer));
    std::string payload;
    REQUIRE(handshake.read_message(bytes_of(answer.data()), payload).ok());
    auto transport = *handshake.split();
    sealer = std::make_unique<FrameSealer>(std::move(transport.send));
    opener = std::make_unique<FrameOpener>(std::move(transport.receive));
  }
  std::string seal(const std::string& frame) {
    std::string data;
    std::span<const std::byte> rest = bytes_of(frame);
    REQUIRE(sealer->seal(rest, data).ok());
    REQUIRE(rest.empty());
    return data;
  }
  void write(const std::string& data) {
    v1::Envelope envelope;
    envelope.set_data(data);
    raw.stream->Write(envelope);
  }
  void send(Frame frame) { write(seal(encode_frame(std::move(frame)))); }
  Frame receive() {
    v1::Envelope envelope;
    std::vector<std::string> frames;
    REQUIRE(raw.stream->Read(&envelope));
    REQUIRE(opener->open(bytes_of(envelope.data()), 100000, frames).ok());
    REQUIRE(frames.size() == 1);
    auto frame = decode_frame(bytes_of(frames[0]));
    REQUIRE(frame.ok());
    return *std::move(frame);
  }
  grpc::StatusCode ended_by(const std::string& data) {
    write(data);
    return raw.ending().error_code();
  }

  std::string first;
  RawStream raw;
  std::unique_ptr<FrameSealer> sealer;
  std::unique_ptr<FrameOpener> opener;
};

// A server that completes the handshake and then says what it likes.
struct RudeServer final : v1::SplitInference::Service {
  using Answer = std::variant<std::string, grpc::Status>;  // a frame, or the end of the stream

  explicit RudeServer(const Identity& own) : identity(own) {
    grpc::ServerBuilder builder;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
    builder.RegisterService(this);
    server = builder.BuildAndStart();
    REQUIRE(server);
  }
  ~RudeServer() override { server->Shutdown(std::chrono::system_clock::now()); }

  grpc::Status Session(grpc::ServerContext*,
                       grpc::ServerReaderWriter<v1::Envelope, v1::Envelope>* stream) override {
    const std::lock_guard lock(in_session_);
    v1::Envelope envelope;
    if (!stream->Read(&envelope)) return grpc::Status::CANCELLED;
    if (at_hello) return *at_hello;
    const auto suite = *cipher_suite_from_number(envelope.hello().cipher());
    const std::string prologue = noise_prologue(kProtocolVersion, suite);
    auto handshake = *NoiseHandshake::responder(suite, bytes_of(prologue), identity);
    std::string unused;
    v1::Envelope second;
    if (!handshake.read_message(bytes_of(envelope.data()), unused).ok() ||
        !handshake.write_message(bytes_of(payload), *second.mutable_data()).ok()) {
      return {grpc::StatusCode::UNAUTHENTICATED, "no handshake"};
    }
    stream->Write(second);
    auto transport = *handshake.split();
    FrameSealer sealer(std::move(transport.send));
    FrameOpener opener(std::move(transport.receive));
    while (stream->Read(&envelope)) {
      std::vector<std::string> frames;
      if (!opener.open(bytes_of(envelope.data()), 100000, frames).ok()) break;
      for (const std::string& frame : frames) {
        const Answer said = answer(*decode_frame(bytes_of(frame)));
        if (const auto* status = std::get_if<grpc::Status>(&said)) return *status;
        std::span<const std::byte> rest = bytes_of(std::get<std::string>(said));
        v1::Envelope reply;
        if (!sealer.seal(rest, *reply.mutable_data()).ok()) break;
        stream->Write(reply);
      }
    }
    return grpc::Status::OK;
  }

  // Changes what the server says, once the last stream has ended.
  template <typename Change>
  void change(Change change) {
    const std::lock_guard lock(in_session_);
    change();
  }

  const Identity& identity;
  int port = 0;
  // Set while no stream is open: by change(), after the first one.
  std::optional<grpc::Status> at_hello;
  std::string payload;  // of the second handshake message
  std::function<Answer(const Frame&)> answer;
  std::unique_ptr<grpc::Server> server;

 private:
  std::mutex in_session_;
};

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
  CHECK(counters.bytes_up > up);
  CHECK(counters.bytes_up < up + steps * 300 + up / 1000);
  CHECK(counters.bytes_down > down / 2);  // answers that share a large sum compress a little
  CHECK(rig.server->counters().steps == steps);
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

TEST_CASE("clients and servers that do not know each other get nothing") {
  Rig rig;
  rig.start();
  SECTION("a client that is not on the list") {
    const Identity stranger = Identity::generate();
    rig.options.identity = &stranger;
    const auto link = connect_link(rig.options);
    check_says(link.status(), absl::StatusCode::kPermissionDenied, "allow list");
    // The user can paste the key from the message into the server's list.
    check_says(link.status(), absl::StatusCode::kPermissionDenied,
               format_public_key(stranger.public_key()));
    CHECK(rig.server->counters().refused == 1);
  }
  SECTION("a server with another key") {
    rig.options.server_key = Identity::generate().public_key();
    check_says(connect_link(rig.options).status(), absl::StatusCode::kUnauthenticated,
               "pinned server key");
    CHECK(rig.server->counters().refused == 1);
  }
  SECTION("a pinned key that is no key") {
    rig.options.server_key = {};
    check_says(connect_link(rig.options).status(), absl::StatusCode::kUnauthenticated,
               "not a valid key");
  }
  CHECK(rig.server->counters().handshakes == 0);
  CHECK(rig.body.sessions == 0);
  CHECK(rig.body.seen.empty());
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

TEST_CASE("the server checks what a client did not") {
  Rig rig;
  rig.server_options.max_rows_per_step = 100;
  rig.start();
  RawClient client(rig);
  client.send({7, open_frame(rig)});
  const Frame opened = client.receive();
  CHECK(opened.request == 7);
  const std::uint64_t session = std::get<OpenedFrame>(opened.kind).session.id;

  const std::size_t row_bytes = wire_row_bytes(WireDtype::kF16, 96);
  auto error_of = [&](std::uint64_t id, std::uint32_t start, std::uint32_t rows,
                      std::size_t bytes) {
    client.send({8, StepFrame{.session = id,
                              .start_pos = start,
                              .rows = rows,
                              .tensor = {.bytes = std::string(bytes, '\0')}}});
    const Frame answer = client.receive();
    CHECK(answer.request == 8);
    const auto* error = std::get_if<ErrorFrame>(&answer.kind);
    return error == nullptr ? absl::OkStatus() : error->status;
  };
  check_says(error_of(session, 0, 101, 101 * row_bytes), absl::StatusCode::kInvalidArgument,
             "takes 100");
  check_says(error_of(session, 1999, 2, 2 * row_bytes), absl::StatusCode::kInvalidArgument,
             "context of 2000");
  check_says(error_of(session, 0xfffffff0, 15, 15 * row_bytes), absl::StatusCode::kInvalidArgument,
             "context of 2000");
  check_says(error_of(session, 0, 2, 2 * row_bytes - 1), absl::StatusCode::kInvalidArgument,
             "came with 383");
  check_says(error_of(session ^ 1, 0, 2, 2 * row_bytes), absl::StatusCode::kNotFound, "session");
  CHECK(rig.body.seen.empty());
  CHECK(error_of(session, 0, 2, 2 * row_bytes).ok());
  // What cannot even be a position ends the stream.
  client.send({9, StepFrame{.session = session, .start_pos = 0xffffffff, .rows = 1}});
  CHECK(client.raw.ending().error_code() == grpc::StatusCode::INVALID_ARGUMENT);
}

TEST_CASE("values that are not finite, short tensors and foreign sessions are refused") {
  Rig rig;
  rig.start();
  const auto link = rig.connect();
  Talk talk(*link, 96, WireDtype::kF32);
  REQUIRE(talk.step(0, 3, Wanted::kLast).ok());
  std::vector<std::byte> wire(2 * wire_row_bytes(WireDtype::kF32, 96));
  StepRequest request{.session = talk.session.id,
                      .start_pos = 3,
                      .rows = 2,
                      .dtype = WireDtype::kF32,
                      .tensor = wire};
  StepReply reply;
  PhaseTimes times;
  for (float bad : {std::numeric_limits<float>::infinity(), std::nanf("")}) {
    std::memcpy(wire.data() + wire.size() - 4, &bad, 4);
    check_says(link->step(request, {}, reply, times), absl::StatusCode::kInvalidArgument, "row 1");
  }
  request.tensor = std::span<const std::byte>(wire).first(wire.size() - 1);
  check_says(link->step(request, {}, reply, times), absl::StatusCode::kInvalidArgument, "768");
  request.rows = 0;
  check_says(link->step(request, {}, reply, times), absl::StatusCode::kInvalidArgument, "0 rows");
  request.session ^= 1;
  check_says(link->step(request, {}, reply, times), absl::StatusCode::kNotFound, "session");

  // Another client's session, known by its number, is no session here.
  const auto other = rig.connect();
  Talk others(*other, 96, WireDtype::kF32);
  request.session = others.session.id;
  check_says(link->step(request, {}, reply, times), absl::StatusCode::kNotFound, "session");
  CHECK(talk.step(3, 2, Wanted::kAll).ok());

  link->close_session(talk.session.id);
  check_says(talk.step(5, 1, Wanted::kLast), absl::StatusCode::kNotFound, "session");
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
  check_says(b.step(20, 500, Wanted::kLast), absl::StatusCode::kResourceExhausted,
             "no room for 520 positions");
  b.rows = kept;
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
  CHECK(b.step(100, 1, Wanted::kAll).code() == absl::StatusCode::kResourceExhausted);
}

TEST_CASE("an answer that is not finite becomes the body's error") {
  Rig rig;
  rig.start();
  const auto link = rig.connect();
  for (WireDtype dtype : kDtypes) {
    Talk talk(*link, 96, dtype);
    REQUIRE(talk.step(0, 3, Wanted::kAll).ok());
    rig.body.broken = true;
    check_says(talk.step(3, 2, Wanted::kAll), absl::StatusCode::kInternal, "not finite");
    rig.body.broken = false;
    CHECK(talk.step(3, 2, Wanted::kAll).ok());
  }
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
             "cannot reach name.invalid:5000");
  for (const char* address : {"", "host", ":50", "host:"}) {
    rig.options.server = address;
    check_says(connect_link(rig.options).status(), absl::StatusCode::kInvalidArgument, "host:port");
  }
}

TEST_CASE("a server that accepts and says nothing") {
  // A listening socket that nobody answers on.
  const int silent = ::socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  REQUIRE(::bind(silent, reinterpret_cast<sockaddr*>(&address), size) == 0);
  REQUIRE(::listen(silent, 1) == 0);
  REQUIRE(::getsockname(silent, reinterpret_cast<sockaddr*>(&address), &size) == 0);
  Rig rig;
  rig.use_port(ntohs(address.sin_port));
  SECTION("the deadline ends the attempt") {
    rig.options.connect_timeout = milliseconds(300);
    const auto start = std::chrono::steady_clock::now();
    check_says(connect_link(rig.options).status(), absl::StatusCode::kDeadlineExceeded, "300 ms");
    const auto elapsed = std::chrono::steady_clock::now() - start;
    CHECK(elapsed >= milliseconds(299));
    CHECK(elapsed < milliseconds(3000));
  }
  SECTION("the stop token ends the attempt") {
    std::stop_source stop;
    std::thread stopper([&] {
      std::this_thread::sleep_for(milliseconds(200));
      stop.request_stop();
    });
    CHECK(connect_link(rig.options, stop.get_token()).status().code() ==
          absl::StatusCode::kCancelled);
    stopper.join();
  }
  ::close(silent);
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

TEST_CASE("what crosses the line shows neither rows nor keys nor fingerprints") {
  Rig rig;
  rig.start();
  Relay relay(rig.server->port());
  rig.use_port(relay.port());

  // The search itself works: what is sent in the clear is found.
  const std::string canary = "a canary that is not encrypted at all";
  {
    RawStream stream(rig.options.server);
    stream.stream->Write(hello(CipherSuite::kChaChaPoly, canary));
    CHECK(stream.ending().error_code() == grpc::StatusCode::UNAUTHENTICATED);
  }
  CHECK(relay.up().find(canary) != std::string::npos);

  std::vector<float> sent;
  std::vector<std::string> secrets = {
      raw(rig.client_identity.public_key()), raw(rig.server_identity.public_key()),
      raw(rig.options.model_fingerprint), raw(rig.options.cloak_commitment), "known body"};
  for (const Identity* identity : {&rig.client_identity, &rig.server_identity}) {
    const auto* key = reinterpret_cast<const char*>(identity->secret_key().data());
    secrets.emplace_back(key, 32);
  }
  {
    const auto link = rig.connect();
    for (WireDtype dtype : kDtypes) {
      Talk talk(*link, 96, dtype);
      for (std::uint32_t rows : {1, 1, 50}) {
        REQUIRE(talk.step(0, rows, Wanted::kAll).ok());
        for (const auto& row : talk.rows) sent.insert(sent.end(), row.begin(), row.end());
        // Sixteen bytes of every row, up and down.
        const std::size_t row_bytes = wire_row_bytes(dtype, 96);
        for (const auto* tensor : {&talk.sent, &talk.reply.tensor}) {
          for (std::size_t at = 0; at < tensor->size(); at += row_bytes) {
            secrets.emplace_back(reinterpret_cast<const char*>(tensor->data()) + at, 16);
          }
        }
      }
    }
  }
  const std::string line = relay.up() + relay.down();
  CHECK(line.size() > sent.size());
  std::size_t found = 0;
  for (const std::string& secret : secrets) found += line.find(secret) != std::string::npos;
  CHECK(secrets.size() > 300);
  CHECK(found == 0);
  // And the server process got the cloaked rows, all of them and nothing else.
  CHECK(rig.body.seen == sent);
}

TEST_CASE("streams that do not follow the protocol are ended, the others go on") {
  Rig rig;
  rig.server_options.handshake_timeout = milliseconds(300);
  rig.start();
  const auto link = rig.connect();
  Talk talk(*link, 96, WireDtype::kF16);
  REQUIRE(talk.step(0, 2, Wanted::kAll).ok());
  const CipherSuite suite = CipherSuite::kChaChaPoly;
  const std::string prologue = noise_prologue(kProtocolVersion, suite);

  SECTION("no hello") {
    RawStream stream(rig.options.server);
    v1::Envelope envelope;
    envelope.set_data("something");
    stream.stream->Write(envelope);
    CHECK(stream.ending().error_code() == grpc::StatusCode::INVALID_ARGUMENT);
  }
  SECTION("another version") {
    RawStream stream(rig.options.server);
    v1::Envelope envelope = hello(suite, std::string(96, 'x'));
    envelope.mutable_hello()->set_version(kProtocolVersion + 1);
    stream.stream->Write(envelope);
    v1::Envelope answer;
    REQUIRE(stream.stream->Read(&answer));
    CHECK(answer.refusal().versions(0) == kProtocolVersion);
    CHECK(stream.ending().error_code() == grpc::StatusCode::FAILED_PRECONDITION);
  }
  SECTION("a payload in the first message") {
    RawStream stream(rig.options.server);
    auto handshake = *NoiseHandshake::initiator(suite, bytes_of(prologue), rig.client_identity,
                                                rig.options.server_key);
    std::string first;
    REQUIRE(handshake.write_message(bytes_of("early"), first).ok());
    stream.stream->Write(hello(suite, first));
    CHECK(stream.ending().error_code() == grpc::StatusCode::UNAUTHENTICATED);
  }
  SECTION("silence") {
    RawStream stream(rig.options.server);
    CHECK(stream.ending().error_code() == grpc::StatusCode::DEADLINE_EXCEEDED);
  }
  SECTION("a replayed first message opens nothing") {
    RawClient original(rig);
    RawStream replay(rig.options.server);
    replay.stream->Write(hello(suite, original.first));
    v1::Envelope answer;
    REQUIRE(replay.stream->Read(&answer));
    // The replayer does not have the key for what must follow.
    v1::Envelope envelope;
    envelope.set_data(original.seal(encode_frame({1, open_frame(rig)})));
    replay.stream->Write(envelope);
    CHECK(replay.ending().error_code() == grpc::StatusCode::DATA_LOSS);
    CHECK(rig.server->counters().open_sessions == 1);
    CHECK(rig.server->counters().handshakes == 1);  // the link's
    CHECK(rig.server->counters().refused == 1);
  }
  SECTION("a repeated record") {
    RawClient rude(rig);
    const std::string record = rude.seal(encode_frame({1, open_frame(rig)}));
    CHECK(rude.ended_by(record + record) == grpc::StatusCode::DATA_LOSS);
  }
  SECTION("an empty envelope") {
    RawClient rude(rig);
    CHECK(rude.ended_by("") == grpc::StatusCode::DATA_LOSS);
  }
  SECTION("a cut record") {
    RawClient rude(rig);
    std::string record = rude.seal(encode_frame({1, open_frame(rig)}));
    record.pop_back();
    CHECK(rude.ended_by(record) == grpc::StatusCode::DATA_LOSS);
  }
  SECTION("bytes that are no frame") {
    RawClient rude(rig);
    CHECK(rude.ended_by(rude.seal("\xff\xff\xff")) == grpc::StatusCode::INVALID_ARGUMENT);
  }
  SECTION("a frame for clients") {
    RawClient rude(rig);
    CHECK(rude.ended_by(rude.seal(encode_frame({1, ErrorFrame{absl::InternalError("x")}}))) ==
          grpc::StatusCode::INVALID_ARGUMENT);
  }
  SECTION("a large frame before there is a session") {
    RawClient rude(rig);
    CHECK(rude.ended_by(rude.seal(std::string(kMaxFrameOverhead + 1, 'x'))) ==
          grpc::StatusCode::RESOURCE_EXHAUSTED);
  }
  SECTION("an envelope beyond the limit") {
    RawClient rude(rig);
    CHECK(rude.ended_by(std::string(kMaxEnvelopeBytes + 1, 'x')) ==
          grpc::StatusCode::RESOURCE_EXHAUSTED);
  }
  const absl::Status status = talk.step(2, 3, Wanted::kAll);
  INFO(status);
  CHECK(status.ok());
}

TEST_CASE("requests of one connection may be in flight together") {
  Rig rig;
  rig.server_options.max_pending_per_connection = 4;
  rig.start();
  RawClient client(rig);
  // More, without waiting, than the server keeps at once.
  constexpr std::uint64_t kRequests = 30;
  for (std::uint64_t i = 1; i <= kRequests; ++i) client.send({i, open_frame(rig)});
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
  RawClient client(rig);
  client.send({1, open_frame(rig)});
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

TEST_CASE("a stream whose client proves nothing ends, the others may be idle") {
  Rig rig;
  rig.server_options.first_frame_timeout = milliseconds(1000);
  rig.start();
  const auto link = rig.connect();
  Talk talk(*link, 96, WireDtype::kF16);
  CHECK(rig.server->counters().handshakes == 1);
  RawClient original(rig);  // itself without a frame
  RawStream replay(rig.options.server);
  replay.stream->Write(hello(CipherSuite::kChaChaPoly, original.first));
  CHECK(replay.ending().error_code() == grpc::StatusCode::DEADLINE_EXCEEDED);
  CHECK(original.raw.ending().error_code() == grpc::StatusCode::DEADLINE_EXCEEDED);
  CHECK(rig.server->counters().handshakes == 1);
  CHECK(rig.server->counters().refused == 2);
  CHECK(talk.step(0, 3, Wanted::kAll).ok());
}

TEST_CASE("a large frame may come late, after the last session was closed") {
  Rig rig;
  rig.start();
  RawClient client(rig);
  client.send({1, open_frame(rig)});
  const std::uint64_t session = std::get<OpenedFrame>(client.receive().kind).session.id;
  client.send({2, CloseFrame{session}});
  const std::string rows(20 * wire_row_bytes(WireDtype::kF16, 96), '\0');
  client.send({3, StepFrame{.session = session, .rows = 20, .tensor = {.bytes = rows}}});
  const Frame answer = client.receive();
  REQUIRE(std::holds_alternative<ErrorFrame>(answer.kind));
  CHECK(std::get<ErrorFrame>(answer.kind).status.code() == absl::StatusCode::kNotFound);
}

TEST_CASE("whatever a server says, the end of a link is not one request's fault") {
  using absl::StatusCode;
  const std::set<StatusCode> ends = {StatusCode::kUnavailable,      StatusCode::kDataLoss,
                                     StatusCode::kDeadlineExceeded, StatusCode::kUnauthenticated,
                                     StatusCode::kPermissionDenied, StatusCode::kFailedPrecondition,
                                     StatusCode::kCancelled};
  const std::set<StatusCode> errors = {StatusCode::kInvalidArgument, StatusCode::kNotFound,
                                       StatusCode::kResourceExhausted,
                                       StatusCode::kFailedPrecondition, StatusCode::kInternal};
  Rig rig;
  RudeServer server(rig.server_identity);
  rig.use_port(server.port);
  StepReply reply;
  PhaseTimes times;
  const std::vector<std::byte> wire(wire_row_bytes(WireDtype::kF16, 96));
  for (int code = 0; code <= 16; ++code) {
    CAPTURE(code);
    const grpc::Status status(static_cast<grpc::StatusCode>(code), "words");
    server.change([&] { server.at_hello = status; });
    CHECK(ends.count(connect_link(rig.options).status().code()) == 1);

    const auto opened = [](const Frame& frame) {
      return encode_frame(
          {frame.request,
           OpenedFrame{
               {.id = 1, .hidden_size = 96, .max_context = 10, .max_rows = 10, .body = "rude"}}});
    };
    server.change([&] {
      server.at_hello.reset();
      server.answer = [=](const Frame& frame) -> RudeServer::Answer {
        if (std::holds_alternative<OpenFrame>(frame.kind)) return opened(frame);
        return status;
      };
    });
    auto link = rig.connect();
    const auto session = link->open_session({});
    REQUIRE(session.ok());
    const StepRequest request{
        .session = session->id, .rows = 1, .dtype = WireDtype::kF16, .tensor = wire};
    for (int again = 0; again < 2; ++again) {
      const absl::Status ended = link->step(request, {}, reply, times);
      INFO(ended);
      CHECK(ends.count(ended.code()) == 1);
      CHECK(ended.code() != StatusCode::kCancelled);  // nobody here asked for that
    }

    // An Error frame is about the request; the link and its session go on.
    if (code == 0) continue;
    link.reset();
    server.change([&] {
      server.answer = [=](const Frame& frame) -> RudeServer::Answer {
        if (std::holds_alternative<OpenFrame>(frame.kind)) return opened(frame);
        v1::Frame message;
        message.set_version(kProtocolVersion);
        message.set_request(frame.request);
        message.mutable_error()->set_code(static_cast<std::uint32_t>(code));
        message.mutable_error()->set_message("words");
        return message.SerializeAsString();
      };
    });
    link = rig.connect();
    REQUIRE(link->open_session({}).ok());
    const auto own = static_cast<StatusCode>(code);
    for (int again = 0; again < 2; ++again) {
      check_says(link->step(request, {}, reply, times),
                 errors.count(own) == 1 ? own : StatusCode::kInternal, "words");
    }
  }
}

TEST_CASE("a second handshake message that carries something is refused") {
  Rig rig;
  RudeServer server(rig.server_identity);
  server.payload = "early";
  rig.use_port(server.port);
  check_says(connect_link(rig.options).status(), absl::StatusCode::kUnauthenticated,
             "pinned server key");
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
  }
}

}  // namespace infemeral
