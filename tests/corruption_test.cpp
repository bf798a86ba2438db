// Conversations that somebody on the line changes, each in one place: none may end as if nothing
// had been, none may bring a wrong value, and a session beside them goes on.
//
// `corruption_test "[long]"` makes 100,000 of them.
#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <catch2/catch.hpp>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "net/bytes.h"
#include "proto/split_inference.grpc.pb.h"
#include "tests/link_fixture.h"
#include "tests/memory_stream.h"
#include "tests/test_random.h"

namespace infemeral {
namespace {

constexpr std::uint32_t kHiddenSize = 8;
constexpr CipherSuite kSuite = CipherSuite::kChaChaPoly;
enum Direction : std::size_t { kUp, kDown };
using Envelopes = std::array<std::vector<std::string>, 2>;  // of one conversation, by direction

// What happens to one envelope.
struct Plan {
  enum What { kNothing, kFlip, kCut, kAppend, kTwice, kDrop, kSwap, kSplice, kReflect, kKinds };
  What what = kNothing;
  Direction direction = kUp;
  std::size_t index = 0;  // in its direction
  std::size_t where = 0;  // bit, or bytes
};

// Carries out a plan, on serialised envelopes. `recorded` are those of another conversation.
class Line {
 public:
  Line(const Plan& plan, const Envelopes& recorded) : plan_(plan), recorded_(recorded) {}

  // What arrives when `bytes` are sent.
  std::vector<std::string> pass(Direction direction, std::string bytes) {
    const std::size_t index = sent[direction].size();
    sent[direction].push_back(bytes);
    if (held_ && direction == plan_.direction) return {bytes, *std::exchange(held_, std::nullopt)};
    if (direction != plan_.direction || index != plan_.index) return {bytes};
    const bool back = plan_.what == Plan::kReflect;
    const auto& own = sent[1 - direction];
    const auto& others = back && !own.empty() ? own : recorded_[back ? 1 - direction : direction];
    switch (plan_.what) {
      case Plan::kFlip:
        bytes[plan_.where / 8 % bytes.size()] ^= static_cast<char>(1 << plan_.where % 8);
        return {bytes};
      case Plan::kCut:
        bytes.resize(bytes.size() - 1 - plan_.where % bytes.size());
        return {bytes};
      case Plan::kAppend:
        return {longer(bytes)};
      case Plan::kTwice:
        return {bytes, bytes};
      case Plan::kDrop:
        return {};
      case Plan::kSwap:
        held_ = bytes;
        return {};
      case Plan::kSplice:
      case Plan::kReflect:
        return {others[plan_.where % others.size()]};
      default:
        return {bytes};
    }
  }

  Envelopes sent;

 private:
  // With bytes behind its data. Behind the message, they could repeat what it says.
  std::string longer(const std::string& bytes) const {
    v1::Envelope envelope;
    if (!envelope.ParseFromString(bytes)) std::abort();
    const std::string data = envelope.data();
    envelope.mutable_data()->append(data, 0, 1 + plan_.where % data.size());
    return envelope.SerializeAsString();
  }

  const Plan plan_;
  const Envelopes& recorded_;
  std::optional<std::string> held_;
};

// A client's half in memory: opens a session and sends two steps at a time.
class Client {
 public:
  Client(const Identity& identity, const PublicKey& server, const BodyInfo& info, int pairs)
      : info_(info), pairs_(pairs) {
    const std::string prologue = noise_prologue(kProtocolVersion, kSuite);
    handshake_ = std::make_unique<NoiseHandshake>(
        *NoiseHandshake::initiator(kSuite, bytes_of(prologue), identity, server));
    v1::Envelope envelope;
    envelope.mutable_hello()->set_version(kProtocolVersion);
    envelope.mutable_hello()->set_cipher(static_cast<v1::Cipher>(kSuite));
    if (!handshake_->write_message({}, *envelope.mutable_data()).ok()) std::abort();
    outbox.push_back(envelope.SerializeAsString());
  }

  // False when the client refuses what it got.
  bool receive(const std::string& bytes) {
    v1::Envelope envelope;
    if (!envelope.ParseFromString(bytes) || envelope.has_refusal()) return false;
    if (opener_ == nullptr) return finish_handshake(envelope.data());
    std::vector<std::string> frames;
    if (!opener_->open(bytes_of(envelope.data()), 4096, frames).ok()) return false;
    for (const std::string& frame : frames) {
      const auto decoded = decode_frame(bytes_of(frame));
      if (!decoded.ok() || !take(*decoded)) return false;
    }
    return true;
  }

  // Sends two steps more, once a session is open.
  void ask_pair() {
    for (int i = 0; i < 2; ++i) ask_step();
  }

  bool complete() const { return opened_ && pairs_ == 0 && expected_.empty(); }
  bool answered() const { return expected_.empty(); }
  bool wrong() const { return wrong_; }

  std::deque<std::string> outbox;

 private:
  bool finish_handshake(const std::string& message) {
    std::string payload;
    if (message.size() != kNoiseMessage2Size ||
        !handshake_->read_message(bytes_of(message), payload).ok()) {
      return false;
    }
    auto transport = *handshake_->split();
    sealer_ = std::make_unique<FrameSealer>(std::move(transport.send));
    opener_ = std::make_unique<FrameOpener>(std::move(transport.receive));
    send(OpenFrame{info_.model_fingerprint, info_.cloak_commitment, info_.hidden_size});
    return true;
  }

  bool take(const Frame& frame) {
    if (!opened_) {
      const auto* opened = std::get_if<OpenedFrame>(&frame.kind);
      if (opened == nullptr) return false;
      session_ = opened->session.id;
      opened_ = true;
    } else {
      const auto* output = std::get_if<OutputFrame>(&frame.kind);
      if (output == nullptr || expected_.empty() || frame.request != expected_.front().first) {
        return false;
      }
      const auto values = unpack_rows(output->tensor, 1, info_.hidden_size);
      wrong_ |= output->rows != 1 || !values.ok() || *values != expected_.front().second;
      expected_.pop_front();
    }
    if (expected_.empty() && pairs_ > 0) {
      --pairs_;
      ask_pair();
    }
    return true;
  }

  void ask_step() {
    std::vector<float> row(info_.hidden_size);
    for (float& x : row) x = static_cast<float>(random_index(64));
    rows_.push_back(row);
    expected_.emplace_back(request_ + 1, known_answer(rows_, rows_.size() - 1));
    send(StepFrame{.session = session_,
                   .start_pos = static_cast<std::uint32_t>(rows_.size() - 1),
                   .rows = 1,
                   .tensor = pack_rows(WireDtype::kF32, row, info_.hidden_size)});
    if (rows_.size() == info_.max_context) rows_.clear();
  }

  void send(decltype(Frame::kind) kind) {
    const std::string frame = encode_frame({++request_, std::move(kind)});
    auto rest = bytes_of(frame);
    v1::Envelope envelope;
    if (!sealer_->seal(rest, *envelope.mutable_data()).ok()) std::abort();
    outbox.push_back(envelope.SerializeAsString());
  }

  const BodyInfo& info_;
  int pairs_;  // of steps that are still to be sent
  std::unique_ptr<NoiseHandshake> handshake_;
  std::unique_ptr<FrameSealer> sealer_;
  std::unique_ptr<FrameOpener> opener_;
  bool opened_ = false;
  bool wrong_ = false;
  std::uint64_t session_ = 0;
  std::uint64_t request_ = 0;
  std::vector<std::vector<float>> rows_;
  std::deque<std::pair<std::uint64_t, std::vector<float>>> expected_;
};

enum class Outcome { kComplete, kRefused, kStalled };

// A server in memory, and a session on it that is busy all the time.
class Bench {
 public:
  Bench() {
    BodyServerOptions options;
    options.identity = &server_identity_;
    options.allow = {client_identity_.public_key()};
    options.max_rows_per_step = 4;
    options.ciphers = {CipherSuite::kAesGcm, kSuite};
    auto queue = std::make_unique<ManualQueue>(body_);
    queue_ = queue.get();
    state_ = std::make_shared<ServerState>(body_, options, std::move(queue));
    busy_ = std::make_unique<MemoryStream>(state_);
    busy_client_ = client(0);
    Line line(clean_, recorded_);
    pump(*busy_, *busy_client_, line);
    REQUIRE(busy_client_->complete());
  }
  ~Bench() {
    busy_->complete_read(std::nullopt);
    CHECK(busy_->ended() == absl::OkStatus());
    busy_->close();
    CHECK(state_->open.empty());
    CHECK(state_->admission->sessions() == 0);
  }

  // One conversation under the plan. The busy session works before, beside and after it.
  Outcome talk(const Plan& plan) {
    Line line(plan, recorded_);
    MemoryStream stream(state_);
    const auto own = client(2);
    busy_client_->ask_pair();
    Outcome outcome = pump(stream, *own, line);
    Line clean(clean_, recorded_);
    pump(*busy_, *busy_client_, clean);
    wrong = wrong || own->wrong() || busy_client_->wrong() || !busy_client_->answered() ||
            busy_->ended().has_value() || stream.misused();
    if (outcome == Outcome::kComplete) {
      stream.complete_read(std::nullopt);
      if (stream.ended() != absl::OkStatus()) outcome = Outcome::kRefused;
    }
    if (!stream.ended()) stream.connection().on_cancel();
    if (stream.writing()) stream.complete_write(false);
    if (!stream.ended()) wrong = true;
    stream.close();
    wrong = wrong || state_->admission->sessions() != 1;
    last = std::move(line.sent);
    return outcome;
  }

  void record() {
    REQUIRE(talk(clean_) == Outcome::kComplete);
    recorded_ = last;
  }

  Envelopes last;      // of the last conversation
  bool wrong = false;  // a value, the busy session, or the server's books

 private:
  std::unique_ptr<Client> client(int pairs) {
    return std::make_unique<Client>(client_identity_, server_identity_.public_key(), body_.info(),
                                    pairs);
  }

  // Until the client has what it wants, somebody refuses, or nothing moves.
  Outcome pump(MemoryStream& stream, Client& client, Line& line) {
    std::deque<std::string> up;
    while (true) {
      if (stream.writing()) {
        const std::string sent = stream.complete_write(true).SerializeAsString();
        for (const std::string& bytes : line.pass(kDown, sent)) {
          if (!client.receive(bytes)) return Outcome::kRefused;
        }
        continue;
      }
      if (stream.ended()) return Outcome::kRefused;
      if (queue_->waiting() > 0) {
        queue_->run(0);
        continue;
      }
      for (; !client.outbox.empty(); client.outbox.pop_front()) {
        for (auto& bytes : line.pass(kUp, client.outbox.front())) up.push_back(std::move(bytes));
      }
      if (!up.empty() && stream.reading()) {
        v1::Envelope envelope;
        // gRPC ends a stream whose messages do not parse.
        if (!envelope.ParseFromString(up.front())) return Outcome::kRefused;
        up.pop_front();
        stream.complete_read(envelope);
        continue;
      }
      return client.complete() ? Outcome::kComplete : Outcome::kStalled;
    }
  }

  const Identity server_identity_ = Identity::generate();
  const Identity client_identity_ = Identity::generate();
  const Plan clean_;
  KnownBody body_{kHiddenSize};
  ManualQueue* queue_ = nullptr;
  std::shared_ptr<ServerState> state_;
  Envelopes recorded_;
  std::unique_ptr<MemoryStream> busy_;
  std::unique_ptr<Client> busy_client_;
};

Plan random_plan(const Envelopes& recorded) {
  Plan plan;
  plan.what = static_cast<Plan::What>(1 + random_index(Plan::kKinds - 1));
  plan.direction = random_index(2) == 0 ? kUp : kDown;
  plan.index = random_index(recorded[plan.direction].size());
  plan.where = rng()();
  // Only what is sent in pairs can be exchanged.
  if (plan.what == Plan::kSwap) plan.index = 2 + random_index(2) * 2;
  return plan;
}

void corrupt_in_memory(int count) {
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  Bench bench;
  bench.record();
  REQUIRE(bench.last[kUp].size() == 6);
  REQUIRE(bench.last[kDown].size() == 6);
  std::array<int, Plan::kKinds> refused{};
  for (int i = 0; i < count; ++i) {
    const Plan plan = random_plan(bench.last);
    CAPTURE(i, plan.what, plan.direction, plan.index, plan.where);
    const Envelopes sizes = bench.last;
    const Outcome outcome = bench.talk(plan);
    // What is lost is noticed by nobody but the client's clock.
    const bool silent = plan.what == Plan::kDrop && outcome == Outcome::kStalled;
    if (outcome != Outcome::kRefused && !silent) FAIL("not refused");
    if (bench.wrong) FAIL("harm was done");
    ++refused[plan.what];
    bench.last = sizes;
  }
  for (std::size_t what = 1; what < refused.size(); ++what) CHECK(refused[what] > 0);
  bench.record();
  CHECK(!bench.wrong);
}

// ---- the same over gRPC, with the real client ----

// Stands between a client and a server, and changes envelopes.
class Interceptor final : public v1::SplitInference::Service {
 public:
  explicit Interceptor(const std::string& target)
      : stub_(v1::SplitInference::NewStub(
            grpc::CreateChannel(target, grpc::InsecureChannelCredentials()))) {
    grpc::ServerBuilder builder;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
    builder.RegisterService(this);
    server_ = builder.BuildAndStart();
    REQUIRE(server_);
  }
  ~Interceptor() override { server_->Shutdown(std::chrono::system_clock::now()); }

  // For the streams that begin from now on.
  void set_plan(const Plan& plan) {
    const std::lock_guard lock(mutex_);
    plan_ = plan;
  }
  // What the last stream that has ended carried, as it was sent.
  Envelopes last() {
    const std::lock_guard lock(mutex_);
    return last_;
  }
  void set_recorded(Envelopes recorded) { recorded_ = std::move(recorded); }

  grpc::Status Session(grpc::ServerContext* context,
                       grpc::ServerReaderWriter<v1::Envelope, v1::Envelope>* stream) override {
    Plan plan;
    {
      const std::lock_guard lock(mutex_);
      plan = plan_;
    }
    Line up(plan, recorded_), down(plan, recorded_);
    grpc::ClientContext onward_context;
    const auto onward = stub_->Session(&onward_context);
    std::thread upward([&] {
      forward(*stream, *onward, up, kUp);
      onward->WritesDone();
      if (context->IsCancelled()) onward_context.TryCancel();
    });
    forward(*onward, *stream, down, kDown);
    const grpc::Status status = onward->Finish();
    context->TryCancel();  // ends the client's reads: its stream is over
    upward.join();
    const std::lock_guard lock(mutex_);
    last_ = {up.sent[kUp], down.sent[kDown]};
    return status;
  }

  int port = 0;

 private:
  template <typename From, typename To>
  static void forward(From& from, To& to, Line& line, Direction direction) {
    v1::Envelope envelope;
    while (from.Read(&envelope)) {
      for (const std::string& bytes : line.pass(direction, envelope.SerializeAsString())) {
        if (!envelope.ParseFromString(bytes)) envelope.Clear();
        if (!to.Write(envelope)) return;
      }
    }
  }

  const std::unique_ptr<v1::SplitInference::Stub> stub_;
  std::unique_ptr<grpc::Server> server_;
  std::mutex mutex_;
  Plan plan_;
  Envelopes last_;
  Envelopes recorded_;  // set while no stream is open
};

// Five steps of one row, then the last that is not touched.
absl::Status converse(const ClientLinkOptions& options) {
  auto link = connect_link(options);
  if (!link.ok()) return link.status();
  const auto session = (*link)->open_session({});
  if (!session.ok()) return session.status();
  std::vector<std::vector<float>> rows;
  for (std::uint32_t i = 0; i < 5; ++i) {
    rows.emplace_back(kHiddenSize, static_cast<float>(i + 1));
    std::vector<std::byte> wire(wire_row_bytes(WireDtype::kF32, kHiddenSize));
    encode_wire_row(WireDtype::kF32, rows.back(), wire.data());
    StepReply reply;
    PhaseTimes times;
    const absl::Status status = (*link)->step({.session = session->id,
                                               .start_pos = i,
                                               .rows = 1,
                                               .dtype = WireDtype::kF32,
                                               .tensor = wire,
                                               .wanted = Wanted::kLast},
                                              {}, reply, times);
    if (!status.ok()) return status;
    encode_wire_row(WireDtype::kF32, known_answer(rows, i), wire.data());
    if (reply.tensor != wire) return absl::InternalError("a wrong value");
  }
  return absl::OkStatus();
}

void corrupt_over_grpc(int count) {
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  Rig rig(kHiddenSize);
  rig.options.connect_timeout = std::chrono::minutes(2);  // nobody here is slow on purpose
  rig.start();
  const auto busy = rig.connect();
  Talk talk(*busy, kHiddenSize, WireDtype::kF32);
  std::atomic<bool> stop = false;
  absl::Status busy_status;
  std::thread worker([&] {
    for (std::uint32_t i = 0; !stop && busy_status.ok(); ++i) {
      busy_status = talk.step(i % 100, 1, Wanted::kLast);
    }
  });

  {
    Interceptor line(rig.options.server);
    rig.use_port(line.port);
    absl::Status status = converse(rig.options);
    INFO(status);
    CHECK(status.ok());
    CHECK(soon([&] { return line.last()[kDown].size() == 7; }));
    Envelopes recorded = line.last();
    line.set_recorded(recorded);
    for (auto& envelopes : recorded) envelopes.resize(std::min<std::size_t>(envelopes.size(), 6));
    for (int i = 0; i < count; ++i) {
      Plan plan = random_plan(recorded);
      // What is only missing keeps the client waiting until its time is up; link_test has that.
      if (plan.what == Plan::kDrop || plan.what == Plan::kSwap) plan.what = Plan::kFlip;
      CAPTURE(i, plan.what, plan.direction, plan.index, plan.where);
      line.set_plan(plan);
      status = converse(rig.options);
      INFO(status);
      CHECK(!status.ok());
      CHECK(status.code() != absl::StatusCode::kInternal);
      CHECK(status.code() != absl::StatusCode::kDeadlineExceeded);
    }
    line.set_plan({});
    CHECK(converse(rig.options).ok());
  }
  stop = true;
  worker.join();
  INFO(busy_status);
  CHECK(busy_status.ok());
  CHECK(soon([&] { return rig.server->counters().open_sessions == 1; }));
}

}  // namespace

TEST_CASE("every bit of the handshake, flipped, is refused") {
  Bench bench;
  bench.record();
  const Envelopes clean = bench.last;
  for (const Direction direction : {kUp, kDown}) {
    for (std::size_t bit = 0; bit < 8 * clean[direction][0].size(); ++bit) {
      CAPTURE(direction, bit);
      const Plan plan{.what = Plan::kFlip, .direction = direction, .where = bit};
      if (bench.talk(plan) != Outcome::kRefused) FAIL("not refused");
      if (bench.wrong) FAIL("harm was done");
    }
  }
}

TEST_CASE(
    "conversations that are changed in one place are refused, a session beside them goes on") {
  corrupt_in_memory(1500);
}

TEST_CASE("the same over gRPC and with the real client") {
  corrupt_over_grpc(60);
}

TEST_CASE("a hundred thousand of them", "[.long]") {
  corrupt_in_memory(98'000);
  corrupt_over_grpc(2'000);
}

}  // namespace infemeral
