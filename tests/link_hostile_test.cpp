// Peers that are strangers, do not follow the protocol or lie, and those who listen on the line.
#include <chrono>
#include <cstring>
#include <limits>
#include <set>
#include <tuple>

#include "tests/link_fixture.h"
#include "tests/link_peers.h"

namespace infemeral {
namespace {

template <std::size_t N>
std::string raw(const std::array<std::uint8_t, N>& bytes) {
  return std::string(bytes.begin(), bytes.end());
}

// A listening socket; the caller closes it.
struct Listener {
  int socket = -1;
  int port = 0;
};

Listener listen_on_loopback() {
  const int socket = ::socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  REQUIRE(::bind(socket, reinterpret_cast<sockaddr*>(&address), size) == 0);
  REQUIRE(::listen(socket, 1) == 0);
  REQUIRE(::getsockname(socket, reinterpret_cast<sockaddr*>(&address), &size) == 0);
  return {socket, ntohs(address.sin_port)};
}

}  // namespace

TEST_CASE("a port of another program's") {
  Rig rig;
  // What it says, whether it closes the connection then, and whether it waits to be spoken to.
  const std::tuple<std::string, bool, bool> programs[] = {
      {"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n", true, true},
      {"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nno", false, true},
      {"HTTP/1.0 404 Not Found\r\n\r\n", true, true},
      {"SSH-2.0-OpenSSH_9.2p1\r\n", false, false},
      {"-ERR unknown command 'PRI'\r\n", false, true}};
  for (const auto& [says, closes, waits] : programs) {
    CAPTURE(says);
    const Listener listener = listen_on_loopback();
    rig.use_port(listener.port);
    std::thread program([&, &says = says, closes = closes, waits = waits] {
      std::vector<int> open;
      while (true) {
        const int peer = ::accept(listener.socket, nullptr, nullptr);
        if (peer < 0) break;
        char bytes[1000];
        if (waits) (void)!::recv(peer, bytes, sizeof bytes, 0);
        (void)!::send(peer, says.data(), says.size(), MSG_NOSIGNAL);
        // Its own direction only: closed with bytes unread, the line might eat the answer.
        if (closes) ::shutdown(peer, SHUT_WR);
        open.push_back(peer);
      }
      for (const int peer : open) ::close(peer);
    });
    check_says(connect_link(rig.options).status(), absl::StatusCode::kUnavailable,
               "cannot reach " + rig.options.server +
                   ": it does not answer in HTTP/2; check that the port is engine_serve's, and if "
                   "it speaks TLS, give --tls-ca");
    ::shutdown(listener.socket, SHUT_RDWR);  // accept() returns
    program.join();
    ::close(listener.socket);
  }
}

TEST_CASE("a server that accepts and says nothing") {
  const Listener silent = listen_on_loopback();
  Rig rig;
  rig.use_port(silent.port);
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
  ::close(silent.socket);
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

TEST_CASE("the server checks what a client did not") {
  Rig rig;
  rig.server_options.max_rows_per_step = 100;
  rig.start();
  RawClient client(rig.options);
  client.send({7, open_frame(rig.options)});
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
  CHECK(rig.server->counters().failed_steps == std::size(kDtypes));
  CHECK(rig.server->counters().refused_steps == 0);
}

TEST_CASE("a body that has ended ends the stream, and its step is counted") {
  Rig rig;
  rig.start();
  const auto link = rig.connect();
  Talk talk(*link, 96, WireDtype::kF16);
  REQUIRE(talk.step(0, 3, Wanted::kAll).ok());
  rig.body.gone = true;
  check_says(talk.step(3, 1, Wanted::kLast), absl::StatusCode::kUnavailable, "has ended");
  CHECK(rig.server->counters().steps == 2);
  CHECK(rig.server->counters().failed_steps == 1);
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
    RawClient original(rig.options);
    RawStream replay(rig.options.server);
    replay.stream->Write(hello(suite, original.first));
    v1::Envelope answer;
    REQUIRE(replay.stream->Read(&answer));
    // The replayer does not have the key for what must follow.
    v1::Envelope envelope;
    envelope.set_data(original.seal(encode_frame({1, open_frame(rig.options)})));
    replay.stream->Write(envelope);
    CHECK(replay.ending().error_code() == grpc::StatusCode::DATA_LOSS);
    CHECK(rig.server->counters().open_sessions == 1);
    CHECK(rig.server->counters().handshakes == 1);  // the link's
    CHECK(rig.server->counters().refused == 1);
  }
  SECTION("a repeated record") {
    RawClient rude(rig.options);
    const std::string record = rude.seal(encode_frame({1, open_frame(rig.options)}));
    CHECK(rude.ended_by(record + record) == grpc::StatusCode::DATA_LOSS);
  }
  SECTION("an empty envelope") {
    RawClient rude(rig.options);
    CHECK(rude.ended_by("") == grpc::StatusCode::DATA_LOSS);
  }
  SECTION("a cut record") {
    RawClient rude(rig.options);
    std::string record = rude.seal(encode_frame({1, open_frame(rig.options)}));
    record.pop_back();
    CHECK(rude.ended_by(record) == grpc::StatusCode::DATA_LOSS);
  }
  SECTION("bytes that are no frame") {
    RawClient rude(rig.options);
    CHECK(rude.ended_by(rude.seal("\xff\xff\xff")) == grpc::StatusCode::INVALID_ARGUMENT);
  }
  SECTION("a frame for clients") {
    RawClient rude(rig.options);
    CHECK(rude.ended_by(rude.seal(encode_frame({1, ErrorFrame{absl::InternalError("x")}}))) ==
          grpc::StatusCode::INVALID_ARGUMENT);
  }
  SECTION("a large frame before there is a session") {
    RawClient rude(rig.options);
    CHECK(rude.ended_by(rude.seal(std::string(kMaxFrameOverhead + 1, 'x'))) ==
          grpc::StatusCode::RESOURCE_EXHAUSTED);
  }
  SECTION("an envelope beyond the limit") {
    RawClient rude(rig.options);
    CHECK(rude.ended_by(std::string(kMaxEnvelopeBytes + 1, 'x')) ==
          grpc::StatusCode::RESOURCE_EXHAUSTED);
  }
  const absl::Status status = talk.step(2, 3, Wanted::kAll);
  INFO(status);
  CHECK(status.ok());
}

TEST_CASE("a stream whose client proves nothing ends, the others may be idle") {
  Rig rig;
  rig.server_options.first_frame_timeout = milliseconds(1000);
  rig.start();
  const auto link = rig.connect();
  Talk talk(*link, 96, WireDtype::kF16);
  CHECK(rig.server->counters().handshakes == 1);
  RawClient original(rig.options);  // itself without a frame
  RawStream replay(rig.options.server);
  replay.stream->Write(hello(CipherSuite::kChaChaPoly, original.first));
  CHECK(replay.ending().error_code() == grpc::StatusCode::DEADLINE_EXCEEDED);
  CHECK(original.raw.ending().error_code() == grpc::StatusCode::DEADLINE_EXCEEDED);
  CHECK(rig.server->counters().handshakes == 1);
  CHECK(rig.server->counters().refused == 2);
  CHECK(talk.step(0, 3, Wanted::kAll).ok());
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

// gRPC holds the end of a call back from who has not read all that came before it.
TEST_CASE("a step that cannot be sent does not wait behind an answer that nobody has taken") {
  Rig rig;
  rig.options.step_timeout = std::chrono::seconds(60);
  RudeServer server(rig.server_identity);
  rig.use_port(server.port);
  int steps = 0;
  server.answer = [&](const Frame& frame) -> RudeServer::Answer {
    if (std::holds_alternative<StepFrame>(frame.kind) && ++steps == 2) {
      return grpc::Status(grpc::StatusCode::UNAVAILABLE, "words");
    }
    return encode_frame(
        {frame.request,
         OpenedFrame{
             {.id = 1, .hidden_size = 96, .max_context = 10, .max_rows = 10, .body = "rude"}}});
  };
  const auto link = rig.connect();
  REQUIRE(link->open_session({}).ok());
  const std::vector<std::byte> wire(wire_row_bytes(WireDtype::kF16, 96));
  PhaseTimes times;
  const auto begin = std::chrono::steady_clock::now();
  absl::Status status;
  for (std::uint32_t i = 0; i < Link::kMaxInFlight && status.ok(); ++i) {
    status = link->submit(
        {.session = 1, .start_pos = i, .rows = 1, .dtype = WireDtype::kF16, .tensor = wire}, {},
        times);
    std::this_thread::sleep_for(std::chrono::milliseconds(100));  // the server's words come
  }
  check_says(status, absl::StatusCode::kUnavailable, "words");
  CHECK(std::chrono::steady_clock::now() - begin < std::chrono::seconds(30));
}

TEST_CASE("a second handshake message that carries something is refused") {
  Rig rig;
  RudeServer server(rig.server_identity);
  server.payload = "early";
  rig.use_port(server.port);
  check_says(connect_link(rig.options).status(), absl::StatusCode::kUnauthenticated,
             "pinned server key");
}

}  // namespace infemeral
