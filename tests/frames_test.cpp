#include "net/frames.h"

#include <catch2/catch.hpp>
#include <limits>
#include <random>
#include <set>

#include "net/bytes.h"
#include "net/channel.h"
#include "proto/split_inference.pb.h"

namespace infemeral {
namespace {

std::string random_text(std::size_t size) {
  std::string text(size, '\0');
  randombytes_buf(text.data(), text.size());
  return text;
}

Frame decode_ok(const std::string& bytes) {
  absl::StatusOr<Frame> frame = decode_frame(bytes_of(bytes));
  INFO(frame.status());
  REQUIRE(frame.ok());
  return *std::move(frame);
}

// A frame that goes through the wire and back as the same bytes.
template <typename Kind>
Kind round_trip(std::uint64_t request, Kind kind) {
  const std::string bytes = encode_frame({request, std::move(kind)});
  Frame frame = decode_ok(bytes);
  CHECK(frame.request == request);
  CHECK(encode_frame(frame) == bytes);
  REQUIRE(std::holds_alternative<Kind>(frame.kind));
  return std::get<Kind>(std::move(frame.kind));
}

void check_refused(const v1::Frame& message) {
  CAPTURE(message.ShortDebugString());
  CHECK(decode_frame(bytes_of(message.SerializeAsString())).status().code() ==
        absl::StatusCode::kInvalidArgument);
}

v1::Frame good_step() {
  v1::Frame message;
  message.set_version(kProtocolVersion);
  message.mutable_step()->set_session(1);
  message.mutable_step()->set_rows(2);
  message.mutable_step()->mutable_tensor()->set_dtype(v1::DTYPE_F16);
  return message;
}

struct Ends {
  FrameSealer sealer;
  FrameOpener opener;
};

Ends channel() {
  SecretBytes<32> key;
  randombytes_buf(key.data(), key.size());
  return {FrameSealer(CipherState(CipherSuite::kChaChaPoly, key.copy())),
          FrameOpener(CipherState(CipherSuite::kChaChaPoly, key.copy()))};
}

std::vector<std::string> seal_all(FrameSealer& sealer, const std::string& frame) {
  std::vector<std::string> envelopes;
  for (std::span<const std::byte> rest = bytes_of(frame); !rest.empty();) {
    envelopes.emplace_back();
    REQUIRE(sealer.seal(rest, envelopes.back()).ok());
  }
  return envelopes;
}

}  // namespace

TEST_CASE("every kind of frame survives the wire") {
  const OpenFrame open = round_trip(
      7, OpenFrame{.model_fingerprint = {1, 2, 3}, .cloak_commitment = {4, 5}, .hidden_size = 576});
  CHECK(open.model_fingerprint == Fingerprint{1, 2, 3});
  CHECK(open.cloak_commitment == Fingerprint{4, 5});
  CHECK(open.hidden_size == 576);

  const OpenedFrame opened = round_trip(~0ull, OpenedFrame{{.id = ~0ull,
                                                            .hidden_size = 65536,
                                                            .max_context = 0xffffffff,
                                                            .max_rows = 65536,
                                                            .body = "llama 30 layers f16"}});
  CHECK(opened.session.id == ~0ull);
  CHECK(opened.session.hidden_size == 65536);
  CHECK(opened.session.max_context == 0xffffffff);
  CHECK(opened.session.max_rows == 65536);
  CHECK(opened.session.body == "llama 30 layers f16");

  for (WireDtype dtype : {WireDtype::kF32, WireDtype::kF16, WireDtype::kI8}) {
    for (Wanted wanted : {Wanted::kNone, Wanted::kLast, Wanted::kAll}) {
      const std::string data = random_text(1000);
      const StepFrame step =
          round_trip(0, StepFrame{.session = 5,
                                  .start_pos = 0xffffffff - 9,
                                  .rows = 9,
                                  .wanted = wanted,
                                  .tensor = {.dtype = dtype, .lz4 = true, .bytes = data}});
      CHECK(step.session == 5);
      CHECK(step.start_pos == 0xffffffff - 9);
      CHECK(step.rows == 9);
      CHECK(step.wanted == wanted);
      CHECK(step.tensor.dtype == dtype);
      CHECK(step.tensor.lz4);
      CHECK(step.tensor.bytes == data);
    }
  }
  const OutputFrame output = round_trip(
      1, OutputFrame{.rows = 1, .kv_len = 9, .compute_ms = 1.25, .tensor = {.bytes = "abcd"}});
  CHECK(output.rows == 1);
  CHECK(output.kv_len == 9);
  CHECK(output.compute_ms == 1.25);
  CHECK(output.tensor.bytes == "abcd");
  CHECK(round_trip(1, OutputFrame{.kv_len = 3}).rows == 0);
  CHECK(round_trip(1, CloseFrame{77}).session == 77);
  const ErrorFrame error = round_trip(1, ErrorFrame{absl::NotFoundError("no such session")});
  CHECK(error.status == absl::NotFoundError("no such session"));
}

TEST_CASE("an error's code is one of the documented ones") {
  const std::set<int> documented = {3, 5, 8, 9, 13};
  for (int code = 1; code <= 16; ++code) {
    const int expected = documented.count(code) != 0 ? code : 13;
    const absl::Status sent(static_cast<absl::StatusCode>(code), "words");
    v1::Frame message;
    REQUIRE(message.ParseFromString(encode_frame({1, ErrorFrame{sent}})));
    CHECK(message.error().code() == static_cast<std::uint32_t>(expected));

    message.mutable_error()->set_code(static_cast<std::uint32_t>(code));
    const Frame frame = decode_ok(message.SerializeAsString());
    CHECK(std::get<ErrorFrame>(frame.kind).status ==
          absl::Status(static_cast<absl::StatusCode>(expected), "words"));
  }
}

TEST_CASE("texts are made fit for a terminal") {
  const std::string bytes =
      encode_frame({1, ErrorFrame{absl::InternalError("a\x1b[2Jb\nc\xc3\xa9" +
                                                      std::string(2 * kMaxTextBytes, 'x'))}});
  const Frame frame = decode_ok(bytes);
  const std::string text(std::get<ErrorFrame>(frame.kind).status.message());
  CHECK(text.substr(0, 12) == "a?[2Jb?c??xx");
  CHECK(text.size() == kMaxTextBytes);
}

TEST_CASE("frames out of their limits are refused") {
  CHECK(decode_frame(bytes_of(good_step().SerializeAsString())).ok());
  const auto step_with = [](auto change) {
    v1::Frame message = good_step();
    change(*message.mutable_step());
    check_refused(message);
  };
  step_with([](v1::Step& s) { s.set_session(0); });
  step_with([](v1::Step& s) { s.set_rows(0); });
  step_with([](v1::Step& s) { s.set_rows(kMaxFrameRows + 1); });
  step_with([](v1::Step& s) { s.set_start_pos(0xffffffff - 1); });
  step_with([](v1::Step& s) { s.set_wanted(static_cast<v1::Wanted>(3)); });
  step_with([](v1::Step& s) { s.set_wanted(static_cast<v1::Wanted>(-1)); });
  step_with([](v1::Step& s) { s.clear_tensor(); });
  step_with([](v1::Step& s) { s.mutable_tensor()->set_dtype(v1::DTYPE_UNSPECIFIED); });
  step_with([](v1::Step& s) { s.mutable_tensor()->set_dtype(static_cast<v1::Dtype>(4)); });
  step_with([](v1::Step& s) { s.mutable_tensor()->set_dtype(static_cast<v1::Dtype>(-1)); });
  step_with(
      [](v1::Step& s) { s.mutable_tensor()->set_compression(static_cast<v1::Compression>(2)); });

  v1::Frame message;
  message.set_version(kProtocolVersion);
  check_refused(message);
  message.mutable_open()->set_model_fingerprint(std::string(32, 'm'));
  message.mutable_open()->set_cloak_commitment(std::string(32, 'c'));
  check_refused(message);  // no hidden size
  message.mutable_open()->set_hidden_size(kMaxHiddenSize + 1);
  check_refused(message);
  message.mutable_open()->set_hidden_size(1);
  CHECK(decode_frame(bytes_of(message.SerializeAsString())).ok());
  for (std::size_t size : {0, 31, 33}) {
    message.mutable_open()->set_model_fingerprint(std::string(size, 'm'));
    check_refused(message);
    message.mutable_open()->set_model_fingerprint(std::string(32, 'm'));
    message.mutable_open()->set_cloak_commitment(std::string(size, 'c'));
    check_refused(message);
    message.mutable_open()->set_cloak_commitment(std::string(32, 'c'));
  }

  const auto opened_with = [](std::uint64_t id, std::uint32_t hidden, std::uint32_t context,
                              std::uint32_t rows, const std::string& body) {
    v1::Frame frame;
    frame.set_version(kProtocolVersion);
    frame.mutable_opened()->set_session(id);
    frame.mutable_opened()->set_hidden_size(hidden);
    frame.mutable_opened()->set_max_context(context);
    frame.mutable_opened()->set_max_rows(rows);
    frame.mutable_opened()->set_body(body);
    return frame;
  };
  CHECK(decode_frame(bytes_of(opened_with(1, 1, 1, 1, "x").SerializeAsString())).ok());
  check_refused(opened_with(0, 1, 1, 1, "x"));
  check_refused(opened_with(1, 0, 1, 1, "x"));
  check_refused(opened_with(1, kMaxHiddenSize + 1, 1, 1, "x"));
  check_refused(opened_with(1, 1, 0, 1, "x"));
  check_refused(opened_with(1, 1, 1, 0, "x"));
  check_refused(opened_with(1, 1, 1, kMaxFrameRows + 1, "x"));
  check_refused(opened_with(1, 1, 1, 1, "x\n"));
  check_refused(opened_with(1, 1, 1, 1, std::string(kMaxTextBytes + 1, 'x')));

  message.mutable_close()->set_session(0);
  check_refused(message);

  for (std::uint32_t code : {0u, 17u, 0xffffffffu}) {
    message.mutable_error()->set_code(code);
    check_refused(message);
  }
  message.mutable_error()->set_code(5);
  message.mutable_error()->set_message("\x1b[2J");
  check_refused(message);

  v1::Output& output = *message.mutable_output();
  for (double ms :
       {-1.0, std::numeric_limits<double>::infinity(), std::numeric_limits<double>::quiet_NaN()}) {
    output.set_compute_ms(ms);
    check_refused(message);
  }
  output.set_compute_ms(0);
  CHECK(decode_frame(bytes_of(message.SerializeAsString())).ok());
  output.set_rows(1);
  check_refused(message);  // rows without a tensor
  output.mutable_tensor()->set_dtype(v1::DTYPE_F32);
  output.set_rows(kMaxFrameRows + 1);
  check_refused(message);
  output.set_rows(0);
  check_refused(message);  // a tensor without rows
}

TEST_CASE("another version is named, other bytes are refused") {
  v1::Frame message = good_step();
  message.set_version(kProtocolVersion + 1);
  const absl::Status status = decode_frame(bytes_of(message.SerializeAsString())).status();
  CHECK(status.code() == absl::StatusCode::kUnimplemented);
  CHECK(std::string(status.message()).find("version 2") != std::string::npos);

  CHECK(!decode_frame({}).ok());
  const std::string good = encode_frame({3, CloseFrame{1}});
  CHECK(!decode_frame(bytes_of(good + "\xff")).ok());
  for (std::size_t size = 0; size < good.size(); ++size) {
    CHECK(!decode_frame(bytes_of(good.substr(0, size))).ok());
  }
}

TEST_CASE("the prologue is 32 bytes that name service, version and cipher") {
  CHECK(noise_prologue(1, CipherSuite::kChaChaPoly) ==
        std::string("Infemeral/SplitInference\0\0\0\1\0\0\0\2", 32));
}

TEST_CASE("frames of every size pass through records and envelopes") {
  const std::size_t envelope = kRecordsPerEnvelope * kMaxPiece;
  for (std::size_t size : {std::size_t{1}, std::size_t{2}, kMaxPiece - 1, kMaxPiece, kMaxPiece + 1,
                           2 * kMaxPiece, envelope - 1, envelope, envelope + 1, 3 * envelope}) {
    Ends ends = channel();
    const std::string frame = random_text(size);
    const std::vector<std::string> envelopes = seal_all(ends.sealer, frame);
    CHECK(envelopes.size() == (size + envelope - 1) / envelope);
    std::vector<std::string> frames;
    for (const std::string& data : envelopes) {
      CHECK(frames.empty());
      CHECK(data.size() <= kRecordsPerEnvelope * (2 + kNoiseMaxMessage));
      REQUIRE(ends.opener.open(bytes_of(data), size, frames).ok());
    }
    REQUIRE(frames.size() == 1);
    CHECK(frames[0] == frame);
  }
}

TEST_CASE("several frames may share an envelope") {
  Ends ends = channel();
  std::string data;
  for (const char* frame : {"one", "two", "three"}) data += seal_all(ends.sealer, frame)[0];
  std::vector<std::string> frames;
  REQUIRE(ends.opener.open(bytes_of(data), 5, frames).ok());
  CHECK(frames == std::vector<std::string>{"one", "two", "three"});
}

TEST_CASE("a frame beyond the limit is refused before it is whole") {
  const std::string frame = random_text(kRecordsPerEnvelope * kMaxPiece + 1);
  Ends ends = channel();
  const std::vector<std::string> envelopes = seal_all(ends.sealer, frame);
  std::vector<std::string> frames;
  CHECK(ends.opener.open(bytes_of(envelopes[0]), 2 * kMaxPiece, frames).code() ==
        absl::StatusCode::kResourceExhausted);
  Ends others = channel();
  const std::vector<std::string> more = seal_all(others.sealer, frame);
  REQUIRE(others.opener.open(bytes_of(more[0]), frame.size() - 1, frames).ok());
  CHECK(others.opener.open(bytes_of(more[1]), frame.size() - 1, frames).code() ==
        absl::StatusCode::kResourceExhausted);
  CHECK(frames.empty());
}

TEST_CASE("records that are cut, damaged or against the protocol are refused") {
  const std::string frame = random_text(100);
  const std::size_t size = 2 + 1 + frame.size() + kNoiseTagSize;
  std::vector<std::string> frames;
  for (std::size_t cut = 0; cut < size; ++cut) {
    Ends ends = channel();
    const std::string data = seal_all(ends.sealer, frame)[0];
    REQUIRE(data.size() == size);
    CHECK(ends.opener.open(bytes_of(data.substr(0, cut)), 1000, frames).code() ==
          absl::StatusCode::kDataLoss);
  }
  for (std::size_t bit = 0; bit < 8 * size; ++bit) {
    Ends ends = channel();
    std::string data = seal_all(ends.sealer, frame)[0];
    data[bit / 8] = static_cast<char>(data[bit / 8] ^ (1 << bit % 8));
    CHECK(ends.opener.open(bytes_of(data), 1000, frames).code() == absl::StatusCode::kDataLoss);
  }
  // Plaintexts that no sealer makes: no flag at all, an unknown flag, "more" in a short record.
  for (const std::string& plaintext :
       {std::string(), std::string("\4rest"), std::string("\1rest")}) {
    SecretBytes<32> key;
    CipherState sender(CipherSuite::kChaChaPoly, key.copy());
    FrameOpener opener(CipherState(CipherSuite::kChaChaPoly, key.copy()));
    std::string message;
    REQUIRE(sender.encrypt({}, bytes_of(plaintext), message).ok());
    const std::string data = std::string{'\0', static_cast<char>(message.size())} + message;
    CHECK(opener.open(bytes_of(data), 1000, frames).code() == absl::StatusCode::kDataLoss);
  }
  CHECK(frames.empty());
}

}  // namespace infemeral
