// A server or a body that runs out of memory in the middle of a request: the client is told, or its
// stream ends, with ResourceExhausted; the server and the other clients go on.
#include <algorithm>
#include <catch2/catch.hpp>
#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cpu/body.h"
#include "cpu/prepare.h"
#include "net/bytes.h"
#include "tests/memory_stream.h"
#include "tests/test_random.h"
#include "tests/tiny_model.h"

namespace {

// What fails: the n-th allocation from now of at least kLarge bytes, once. Small ones do not fail
// on a system that overcommits its memory, and libraries take them for granted.
constexpr std::size_t kLarge = 1024;
thread_local int fail_in = 0;

void* allocate(std::size_t size, std::size_t alignment) {
  if (size >= kLarge && fail_in > 0 && --fail_in == 0) return nullptr;
  return std::aligned_alloc(alignment, (size + alignment - 1) / alignment * alignment);
}

}  // namespace

// Not inlined: the compiler would see malloc's memory given to delete, or new's to free.
[[gnu::noinline]] void* operator new(std::size_t size) {
  void* memory = allocate(size, alignof(std::max_align_t));
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
[[gnu::noinline]] void* operator new(std::size_t size, std::align_val_t alignment) {
  void* memory = allocate(size, static_cast<std::size_t>(alignment));
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
[[gnu::noinline]] void operator delete(void* memory) noexcept {
  std::free(memory);
}
[[gnu::noinline]] void operator delete(void* memory, std::align_val_t) noexcept {
  std::free(memory);
}
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept {
  std::free(memory);
}

namespace infemeral {
namespace {

constexpr std::uint32_t kHiddenSize = 96;
constexpr CipherSuite kSuite = CipherSuite::kChaChaPoly;

// Gives its input back. A session takes memory at once.
class Echo final : public Body {
 public:
  Echo() {
    info_.hidden_size = kHiddenSize;
    info_.max_context = 1000;
    info_.kv_bytes_per_token = 1;
  }
  const BodyInfo& info() const override { return info_; }
  absl::StatusOr<std::unique_ptr<BodySession>> new_session() override {
    return std::make_unique<Session>();
  }
  void run(std::span<BodyStep> steps) override {
    for (BodyStep& step : steps) {
      std::copy(step.states.begin(), step.states.end(), step.out.begin());
      static_cast<Session*>(step.session)->length = step.start_pos + step.rows;
    }
  }

 private:
  struct Session final : BodySession {
    std::uint32_t kv_len() const override { return length; }
    std::size_t kv_bytes() const override { return memory.size(); }
    std::uint32_t length = 0;
    std::string memory = std::string(2 * kLarge, '\0');
  };
  BodyInfo info_;
};

// A client in memory that asks for one thing at a time.
class Client {
 public:
  Client(const std::shared_ptr<ServerState>& state, ManualQueue& queue, const Identity& identity)
      : stream_(state), queue_(queue) {
    const std::string prologue = noise_prologue(kProtocolVersion, kSuite);
    auto handshake = *NoiseHandshake::initiator(kSuite, bytes_of(prologue), identity,
                                                state->identity.public_key());
    v1::Envelope envelope;
    envelope.mutable_hello()->set_version(kProtocolVersion);
    envelope.mutable_hello()->set_cipher(static_cast<v1::Cipher>(kSuite));
    REQUIRE(handshake.write_message({}, *envelope.mutable_data()).ok());
    stream_.complete_read(envelope);
    std::string payload;
    const v1::Envelope answer = stream_.complete_write(true);
    REQUIRE(handshake.read_message(bytes_of(answer.data()), payload).ok());
    auto transport = *handshake.split();
    sealer_ = std::make_unique<FrameSealer>(std::move(transport.send));
    opener_ = std::make_unique<FrameOpener>(std::move(transport.receive));
  }
  ~Client() {
    if (stream_.reading() && !stream_.ended()) stream_.complete_read(std::nullopt);
    CHECK(stream_.ended().has_value());
    stream_.close();
  }

  // The answer, or nothing when the stream ended instead. The `failing`-th large allocation of the
  // server fails, if there are as many.
  std::optional<Frame> ask(decltype(Frame::kind) kind, int failing) {
    const bool asked_to_fail = failing > 0;
    const std::string frame = encode_frame({++request_, std::move(kind)});
    std::vector<std::string> frames;
    for (auto rest = bytes_of(frame); !rest.empty() && !stream_.ended();) {
      v1::Envelope envelope;
      REQUIRE(sealer_->seal(rest, *envelope.mutable_data()).ok());
      fail_in = failing;
      stream_.complete_read(std::move(envelope));
      failing = std::exchange(fail_in, 0);
    }
    fail_in = failing;
    while (queue_.waiting() > 0) queue_.run(0);
    injected = std::exchange(fail_in, 0) == 0 && asked_to_fail;
    while (stream_.writing()) {
      const v1::Envelope envelope = stream_.complete_write(true);
      REQUIRE(opener_->open(bytes_of(envelope.data()), 1 << 20, frames).ok());
    }
    CHECK(!stream_.misused());
    if (frames.empty()) return std::nullopt;
    REQUIRE(frames.size() == 1);
    return *decode_frame(bytes_of(frames[0]));
  }

  const std::optional<absl::Status>& ended() const { return stream_.ended(); }

  bool injected = false;  // whether the last request met the failure

 private:
  MemoryStream stream_;
  ManualQueue& queue_;
  std::unique_ptr<FrameSealer> sealer_;
  std::unique_ptr<FrameOpener> opener_;
  std::uint64_t request_ = 0;
};

StepFrame step(std::uint64_t session, std::uint32_t start_pos, std::uint32_t rows) {
  const std::vector<float> values(rows * kHiddenSize, 1);
  return {.session = session,
          .start_pos = start_pos,
          .rows = rows,
          .wanted = Wanted::kAll,
          .tensor = pack_rows(WireDtype::kF32, values, kHiddenSize)};
}

}  // namespace

TEST_CASE("a session whose memory runs out is told so, the others go on") {
  const Identity server_identity = Identity::generate(), client_identity = Identity::generate();
  Echo body;
  BodyServerOptions options;
  options.identity = &server_identity;
  options.allow = {client_identity.public_key()};
  options.ciphers = {kSuite};
  auto made = std::make_unique<ManualQueue>(body);
  ManualQueue& queue = *made;
  const auto state = std::make_shared<ServerState>(body, options, std::move(made));
  const OpenFrame open{body.info().model_fingerprint, body.info().cloak_commitment, kHiddenSize};

  Client busy(state, queue, client_identity);
  const auto own = std::get<OpenedFrame>(busy.ask(open, 0)->kind).session.id;
  {
    Client client(state, queue, client_identity);
    const auto refused = client.ask(open, 1);
    REQUIRE(refused);
    CHECK(std::get<ErrorFrame>(refused->kind).status.code() ==
          absl::StatusCode::kResourceExhausted);
    CHECK(state->admission->sessions() == 1);
    CHECK(std::holds_alternative<OpenedFrame>(client.ask(open, 0)->kind));
  }
  std::uint32_t positions = 0;
  // Rows of more than one record, and fewer, so that nothing has to grow.
  for (const std::uint32_t rows : {300u, 3u}) {
    int told = 0, ended = 0;
    bool injected = true;
    for (int n = 1; injected; ++n) {
      CAPTURE(rows, n);
      REQUIRE(n < 1000);
      Client client(state, queue, client_identity);
      const auto session = std::get<OpenedFrame>(client.ask(open, 0)->kind).session.id;
      const auto answer = client.ask(step(session, 0, rows), n);
      injected = client.injected;
      if (!answer) {
        REQUIRE(client.ended());
        CHECK(client.ended()->code() == absl::StatusCode::kResourceExhausted);
        ++ended;
      } else if (const auto* error = std::get_if<ErrorFrame>(&answer->kind)) {
        CHECK(error->status.code() == absl::StatusCode::kResourceExhausted);
        // And then it works again.
        const auto again = client.ask(step(session, 0, rows), 0);
        REQUIRE(again);
        CHECK(std::get<OutputFrame>(again->kind).rows == rows);
        ++told;
      } else {
        CHECK(!injected);
      }
      const auto others = busy.ask(step(own, positions++, 1), 0);
      REQUIRE(others);
      CHECK(std::get<OutputFrame>(others->kind).kv_len == positions);
    }
    CHECK(told + ended > 0);
    if (rows == 300) CHECK(told > 0);
  }
  CHECK(state->admission->sessions() == 1);
}

TEST_CASE("a body whose memory runs out holds no position that it has not computed") {
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  const TempFolder folder;
  make_tiny_model(folder.path() / "model", {.seed = rng()()});
  REQUIRE(
      prepare_model(
          {.model_dir = folder.path() / "model", .output_dir = folder.path() / "out", .threads = 1})
          .ok());
  constexpr std::uint32_t kRows = 70, kFirst = 20;
  std::normal_distribution<float> normal;
  std::vector<float> states(kRows * 64);
  for (float& value : states) value = normal(rng());
  const auto step = [&](Body& body, BodySession& session, std::uint32_t begin, std::uint32_t end,
                        int failing) {
    std::vector<float> out((end - begin) * 64);
    BodyStep one{.session = &session,
                 .start_pos = begin,
                 .rows = end - begin,
                 .states = std::span(states).subspan(begin * 64, out.size()),
                 .wanted = Wanted::kAll,
                 .out = out};
    fail_in = failing;
    body.run({&one, 1});
    const bool injected = std::exchange(fail_in, 0) == 0 && failing > 0;
    CHECK(injected == !one.status.ok());
    if (injected) CHECK(one.status.code() == absl::StatusCode::kResourceExhausted);
    return one.status.ok() ? out : std::vector<float>();
  };
  std::vector<float> expected;
  int failures = 0;
  for (int n = 0; n == 0 || failures == n - 1; ++n) {
    CAPTURE(n);
    REQUIRE(n < 200);
    // Anew, so that its buffers have to grow.
    const auto body = load_cpu_body(folder.path() / "out" / "body", {.threads = 1}).value();
    const auto session = body->new_session().value();
    REQUIRE(!step(*body, *session, 0, kFirst, 0).empty());
    std::vector<float> out = step(*body, *session, kFirst, kRows, n);
    if (out.empty()) {
      ++failures;
      CHECK(session->kv_len() <= kFirst);
      out = step(*body, *session, 0, kRows, 0);
      out.erase(out.begin(), out.begin() + kFirst * 64);
    }
    if (n == 0) expected = out;
    CHECK(out == expected);
    if (n == 0) failures = 0;
  }
  CHECK(failures > 2);
}

}  // namespace infemeral
