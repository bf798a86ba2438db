// What an observer of the line sees of sizes when frames are padded, and when they are not.
#include <catch2/catch.hpp>
#include <set>

#include "net/bytes.h"
#include "net/frames.h"
#include "tests/link_peers.h"
#include "tests/test_random.h"

namespace infemeral {
namespace {

constexpr std::uint32_t kHiddenSize = 96;
constexpr std::uint32_t kMaxRows = 600;  // of a Rig's server

// The gRPC messages in one recorded direction of an HTTP/2 connection with a single stream.
std::vector<std::size_t> message_sizes(const std::string& bytes, bool from_client) {
  const auto number = [](const std::string& text, std::size_t at, int size) {
    std::size_t value = 0;
    for (int i = 0; i < size; ++i) value = value << 8 | static_cast<unsigned char>(text[at + i]);
    return value;
  };
  std::string data;
  for (std::size_t at = from_client ? 24 : 0; at + 9 <= bytes.size();) {  // behind the preface
    const std::size_t length = number(bytes, at, 3);
    if (at + 9 + length > bytes.size()) break;
    if (bytes[at + 3] == 0) {  // DATA
      REQUIRE((bytes[at + 4] & 8) == 0);
      data.append(bytes, at + 9, length);
    }
    at += 9 + length;
  }
  std::vector<std::size_t> sizes;
  for (std::size_t at = 0; at + 5 <= data.size();) {
    const std::size_t length = number(data, at + 1, 4);
    if (at + 5 + length > data.size()) break;
    sizes.push_back(length);
    at += 5 + length;
  }
  return sizes;
}

// The messages that carry a frame of so many bytes, as docs/protocol.md cuts it.
void expect_frame(std::size_t frame, std::vector<std::size_t>& sizes) {
  while (frame > 0) {
    std::size_t data = 0;
    for (int record = 0; record < 4 && frame > 0; ++record) {
      const std::size_t piece = std::min<std::size_t>(frame, 65518);
      data += 2 + 1 + piece + 16;
      frame -= piece;
    }
    const std::size_t length_bytes = data < 128 ? 1 : data < 16384 ? 2 : 3;
    sizes.push_back(1 + length_bytes + data);
  }
}

// docs/protocol.md's table of buckets, by hand.
std::size_t bucket_bytes(std::uint32_t rows, std::size_t row_bytes) {
  static const std::vector<std::uint32_t> kBuckets = {0,  1,  2,   4,   8,   16,
                                                      32, 64, 128, 256, 512, kMaxRows};
  const std::size_t bucket = *std::lower_bound(kBuckets.begin(), kBuckets.end(), rows);
  return std::max<std::size_t>(1024, 128 + bucket * row_bytes);
}

std::size_t frame_bytes(RawClient& client) {
  v1::Envelope envelope;
  std::vector<std::string> frames;
  REQUIRE(client.raw.stream->Read(&envelope));
  REQUIRE(client.opener->open(bytes_of(envelope.data()), 1000000, frames).ok());
  REQUIRE(frames.size() == 1);
  return frames[0].size();
}

}  // namespace

TEST_CASE("a padded frame has exactly the size that was asked for") {
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  const std::string data(300, 'x');
  const auto make = [&] {
    return Frame{~0ull, StepFrame{.session = ~0ull,
                                  .start_pos = 0xfffffff0,
                                  .rows = 9,
                                  .wanted = Wanted::kAll,
                                  .tensor = {.lz4 = true, .bytes = data}}};
  };
  const std::string bare = encode_frame(make());
  std::vector<std::size_t> sizes;
  for (std::size_t more = 2; more < 1000; ++more) sizes.push_back(bare.size() + more);
  // Around the places where a length takes one byte more.
  for (std::size_t edge : {16384, 2097152}) {
    for (std::size_t i = 0; i < 20; ++i) sizes.push_back(bare.size() + edge - 10 + i);
  }
  for (int i = 0; i < 50; ++i) sizes.push_back(bare.size() + 2 + random_index(100000));
  for (const std::size_t size : sizes) {
    CAPTURE(size, bare.size());
    const std::string padded = encode_frame(make(), size);
    REQUIRE(padded.size() == size);
    const auto frame = decode_frame(bytes_of(padded));
    REQUIRE(frame.ok());
    REQUIRE(encode_frame(*frame) == bare);
  }
  // What does not fit goes as it is.
  for (std::size_t size : {std::size_t{0}, bare.size() - 1, bare.size(), bare.size() + 1}) {
    CHECK(encode_frame(make(), size) == bare);
  }
}

TEST_CASE("every frame fits the size that it is padded to, and that fits every limit") {
  const std::string text(1000, 't');
  const std::string error = encode_frame({~0ull, ErrorFrame{absl::InternalError(text)}}, 1024);
  CHECK(error.size() == 1024);
  const SessionInfo info{.id = ~0ull,
                         .hidden_size = 65536,
                         .max_context = 0xffffffff,
                         .max_rows = 65536,
                         .body = text};
  CHECK(encode_frame({~0ull, OpenedFrame{info, true}}, 1024).size() == 1024);
  for (WireDtype dtype : kDtypes) {
    for (std::size_t hidden_size : {1u, 63u, 96u, 4096u}) {
      const std::size_t row_bytes = wire_row_bytes(dtype, hidden_size);
      for (std::uint32_t rows : {1u, 2u, 3u, 31u, 32u, 33u, 511u, 512u, 513u, 599u, 600u}) {
        CAPTURE(rows, hidden_size, wire_dtype_name(dtype));
        const std::size_t size = padded_frame_bytes(rows, row_bytes, kMaxRows);
        CHECK(size == bucket_bytes(rows, row_bytes));
        CHECK(size <= max_frame_bytes(kMaxRows, hidden_size));
        CHECK(size <= 1024 + 2 * rows * row_bytes);
        // The longest numbers everywhere.
        const std::string tensor(rows * row_bytes, 'x');
        const Frame step{~0ull, StepFrame{.session = ~0ull,
                                          .start_pos = 0xffffffff - rows,
                                          .rows = rows,
                                          .wanted = Wanted::kAll,
                                          .tensor = {.dtype = dtype, .bytes = tensor}}};
        CHECK(encode_frame(step, size).size() == size);
        const Frame output{~0ull, OutputFrame{.rows = rows,
                                              .kv_len = 0xffffffff,
                                              .compute_ms = 0.1,
                                              .tensor = {.dtype = dtype, .bytes = tensor}}};
        CHECK(encode_frame(output, size).size() == size);
      }
    }
  }
  CHECK(padded_frame_bytes(0, 8192, kMaxRows) == 1024);
}

TEST_CASE("on the line, prompts of any length have the sizes of the buckets") {
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  Rig rig(kHiddenSize);
  rig.start();
  Relay relay(rig.server->port());
  rig.use_port(relay.port());
  rig.options.pad = true;
  const auto link = rig.connect();

  const auto hello_size = [](std::size_t data) { return 6 + 2 + data; };  // Hello and data
  std::vector<std::size_t> up = {hello_size(96)}, down = {2 + 48};
  for (WireDtype dtype : kDtypes) {
    const std::size_t row_bytes = wire_row_bytes(dtype, kHiddenSize);
    Talk talk(*link, kHiddenSize, dtype);
    expect_frame(1024, up);
    expect_frame(1024, down);
    for (int i = 0; i < 20; ++i) {
      const auto rows = static_cast<std::uint32_t>(1 + random_index(i % 3 == 0 ? kMaxRows : 40));
      const auto wanted = static_cast<Wanted>(random_index(3));
      const absl::Status status = talk.step(0, rows, wanted);
      INFO(status);
      REQUIRE(status.ok());
      expect_frame(bucket_bytes(rows, row_bytes), up);
      expect_frame(bucket_bytes(output_rows(wanted, rows), row_bytes), down);
    }
    // Rows that LZ4 makes shorter look like others.
    const std::vector<std::byte> zeros(50 * row_bytes);
    StepReply reply;
    PhaseTimes times;
    REQUIRE(link->step({.session = talk.session.id,
                        .rows = 50,
                        .dtype = dtype,
                        .tensor = zeros,
                        .wanted = Wanted::kAll},
                       {}, reply, times)
                .ok());
    CHECK(reply.tensor == zeros);
    expect_frame(bucket_bytes(50, row_bytes), up);
    expect_frame(bucket_bytes(50, row_bytes), down);
    link->close_session(talk.session.id);
    expect_frame(1024, up);
  }
  // The relay keeps its copy a moment after it passed the bytes on.
  CHECK(soon([&] { return message_sizes(relay.up(), true).size() == up.size(); }));
  CHECK(soon([&] { return message_sizes(relay.down(), false).size() == down.size(); }));
  CHECK(message_sizes(relay.up(), true) == up);
  CHECK(message_sizes(relay.down(), false) == down);
}

TEST_CASE("without padding every length shows, with it few do") {
  std::size_t distinct[2] = {};
  for (const bool pad : {false, true}) {
    Rig rig(kHiddenSize);
    rig.start();
    Relay relay(rig.server->port());
    rig.use_port(relay.port());
    rig.options.pad = pad;
    const auto link = rig.connect();
    Talk talk(*link, kHiddenSize, WireDtype::kF16);
    for (std::uint32_t rows = 1; rows <= 32; ++rows) {
      REQUIRE(talk.step(0, rows, Wanted::kLast).ok());
    }
    REQUIRE(soon([&] { return message_sizes(relay.up(), true).size() == 2 + 32; }));
    const std::vector<std::size_t> sizes = message_sizes(relay.up(), true);
    distinct[pad] = std::set<std::size_t>(sizes.begin() + 2, sizes.end()).size();
  }
  CHECK(distinct[false] == 32);
  CHECK(distinct[true] == 4);  // 1 to 4 rows of 192 bytes share the smallest size, then 8, 16, 32
}

TEST_CASE("an error has the size of the answer that was asked for") {
  Rig rig(kHiddenSize);
  rig.start();
  const std::size_t row_bytes = wire_row_bytes(WireDtype::kF32, kHiddenSize);
  const auto step = [&](std::uint64_t session, std::uint32_t start_pos, Wanted wanted,
                        float value) {
    std::string rows(20 * row_bytes, '\0');
    std::memcpy(rows.data(), &value, sizeof value);
    return Frame{2, StepFrame{.session = session,
                              .start_pos = start_pos,
                              .rows = 20,
                              .wanted = wanted,
                              .tensor = {.dtype = WireDtype::kF32, .bytes = rows}}};
  };
  for (const bool pad : {true, false}) {
    RawClient client(rig.options);
    OpenFrame open = open_frame(rig.options);
    open.pad = pad;
    open.hidden_size += 1;
    client.send({1, open});
    CHECK((frame_bytes(client) == 1024) == pad);
    open.hidden_size -= 1;
    client.send({1, open});
    const Frame opened = client.receive();
    REQUIRE(std::holds_alternative<OpenedFrame>(opened.kind));
    CHECK(std::get<OpenedFrame>(opened.kind).padded == pad);
    const std::uint64_t session = std::get<OpenedFrame>(opened.kind).session.id;
    for (Wanted wanted : {Wanted::kNone, Wanted::kLast, Wanted::kAll}) {
      const std::size_t size = bucket_bytes(output_rows(wanted, 20), row_bytes);
      for (const Frame& frame :
           {step(session, 0, wanted, 1), step(session, 0, wanted, std::nanf("")),
            step(session, 1000, wanted, 1), step(session, 5000, wanted, 1),
            step(session + 1, 0, wanted, 1)}) {
        client.send(frame);
        CHECK((frame_bytes(client) == size) == pad);
      }
    }
  }
}

TEST_CASE("a server that does not pad is named once, and serves") {
  Rig rig(kHiddenSize);
  RudeServer server(rig.server_identity);
  rig.use_port(server.port);
  std::uint64_t sessions = 0;
  std::atomic<int> asked = 0;
  server.answer = [&](const Frame& frame) -> RudeServer::Answer {
    if (std::holds_alternative<OpenFrame>(frame.kind)) {
      if (std::get<OpenFrame>(frame.kind).pad) ++asked;
      return encode_frame({frame.request, OpenedFrame{{.id = ++sessions,
                                                       .hidden_size = kHiddenSize,
                                                       .max_context = 100,
                                                       .max_rows = 100,
                                                       .body = "old"}}});
    }
    const auto& step = std::get<StepFrame>(frame.kind);
    return encode_frame({frame.request, OutputFrame{.rows = step.rows,
                                                    .kv_len = step.start_pos + step.rows,
                                                    .tensor = step.tensor}});
  };
  std::vector<std::string> warnings;
  rig.options.pad = true;
  rig.options.log = [&](LogLevel level, std::string_view message) {
    if (level == LogLevel::kWarning) warnings.emplace_back(message);
  };
  const auto link = rig.connect();
  std::vector<std::byte> rows(3 * wire_row_bytes(WireDtype::kF16, kHiddenSize));
  for (std::byte& byte : rows) byte = static_cast<std::byte>(random_index(100));
  for (int i = 0; i < 2; ++i) {
    const auto session = link->open_session({});
    REQUIRE(session.ok());
    StepReply reply;
    PhaseTimes times;
    const absl::Status status = link->step({.session = session->id,
                                            .rows = 3,
                                            .dtype = WireDtype::kF16,
                                            .tensor = rows,
                                            .wanted = Wanted::kAll},
                                           {}, reply, times);
    INFO(status);
    REQUIRE(status.ok());
    CHECK(reply.tensor == rows);
  }
  CHECK(asked == 2);
  REQUIRE(warnings.size() == 1);
  CHECK(warnings[0].find("does not pad its answers") != std::string::npos);
}

}  // namespace infemeral
