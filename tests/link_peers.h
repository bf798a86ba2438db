// Peers that complete the handshake, or not even that, and then say what they like.
#pragma once

#include <grpcpp/grpcpp.h>

#include <catch2/catch.hpp>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "net/bytes.h"
#include "net/channel.h"
#include "net/frames.h"
#include "proto/split_inference.grpc.pb.h"
#include "tests/link_fixture.h"

namespace infemeral {

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

inline v1::Envelope hello(CipherSuite suite, const std::string& data) {
  v1::Envelope envelope;
  envelope.mutable_hello()->set_version(kProtocolVersion);
  envelope.mutable_hello()->set_cipher(static_cast<v1::Cipher>(suite));
  envelope.set_data(data);
  return envelope;
}

inline OpenFrame open_frame(const ClientLinkOptions& options) {
  return {options.model_fingerprint, options.cloak_commitment,
          static_cast<std::uint32_t>(options.hidden_size)};
}

// A client that completes the handshake and then says what it likes.
struct RawClient {
  explicit RawClient(const ClientLinkOptions& options) : raw(options.server) {
    const CipherSuite suite = CipherSuite::kChaChaPoly;
    const std::string prologue = noise_prologue(kProtocolVersion, suite);
    auto handshake = *NoiseHandshake::initiator(suite, bytes_of(prologue), *options.identity,
                                                options.server_key);
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

}  // namespace infemeral
