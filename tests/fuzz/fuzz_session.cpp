// The server's state machine. The input is a list of operations on two clients that hold good keys:
// frames well- and ill-formed, records in any state, reads, writes and steps that complete in any
// order, and ends of all kinds. The scalar multiplications of the handshake are left out, but for
// inputs that begin with 0xff.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "net/bytes.h"
#include "tests/memory_stream.h"

namespace infemeral {
namespace {

constexpr CipherSuite kSuite = CipherSuite::kChaChaPoly;
constexpr char kRekey = 2;  // a record's flag
constexpr std::uint32_t kHiddenSize = 4;
constexpr std::uint32_t kMaxContext = 30;
constexpr std::uint32_t kMaxRows = 8;
constexpr std::uint32_t kMaxPending = 4;
constexpr std::uint32_t kMaxSessions = 3;
constexpr std::uint32_t kMaxPositions = 40;

void check(bool holds) {
  if (!holds) std::abort();
}

SecretKey fixed_key(std::uint8_t fill) {
  SecretKey key;
  std::memset(key.data(), fill, key.size());
  return key;
}

// What is left of the input; zeros behind its end.
class Input {
 public:
  Input(const std::uint8_t* data, std::size_t size) : data_(data), left_(size) {}
  bool empty() const { return left_ == 0; }
  std::uint8_t byte() {
    if (left_ == 0) return 0;
    --left_;
    return *data_++;
  }
  std::string bytes(std::size_t count) {
    count = std::min(count, left_);
    std::string out(reinterpret_cast<const char*>(data_), count);
    data_ += count;
    left_ -= count;
    return out;
  }

 private:
  const std::uint8_t* data_;
  std::size_t left_;
};

// Adds one to every value. Fails on demand.
class StubBody final : public Body {
 public:
  enum class Mood { kWell, kFails, kFull, kNotFinite };

  StubBody() {
    info_.description = "stub";
    info_.hidden_size = kHiddenSize;
    info_.max_context = kMaxContext;
    info_.kv_bytes_per_token = 1;
    info_.model_fingerprint.fill(1);
    info_.cloak_commitment.fill(2);
  }
  const BodyInfo& info() const override { return info_; }
  absl::StatusOr<std::unique_ptr<BodySession>> new_session() override {
    if (mood == Mood::kFull) return absl::ResourceExhaustedError("no memory");
    return std::make_unique<Session>(*this);
  }
  void run(std::span<BodyStep> steps) override {
    for (BodyStep& step : steps) step.status = run_one(step);
  }

  Mood mood = Mood::kWell;
  std::uint32_t sessions = 0;

 private:
  struct Session final : BodySession {
    explicit Session(StubBody& owner) : body(owner) { ++body.sessions; }
    ~Session() override { --body.sessions; }
    std::uint32_t kv_len() const override { return length; }
    std::size_t kv_bytes() const override { return length; }
    StubBody& body;
    std::uint32_t length = 0;
  };

  absl::Status run_one(BodyStep& step) {
    auto& session = static_cast<Session&>(*step.session);
    // What the server has promised to check.
    check(step.rows >= 1 && step.rows <= kMaxRows);
    check(step.start_pos + step.rows <= kMaxContext);
    check(step.states.size() == step.rows * kHiddenSize);
    if (mood == Mood::kFails) return absl::UnknownError("the body failed");
    if (mood == Mood::kFull) return absl::ResourceExhaustedError("no memory");
    if (step.start_pos > session.length) return absl::InvalidArgumentError("beyond the cache");
    session.length = step.start_pos + step.rows;
    const auto from = step.states.last(step.out.size());
    std::transform(from.begin(), from.end(), step.out.begin(), [](float x) { return x + 1; });
    if (mood == Mood::kNotFinite && !step.out.empty()) step.out.back() = std::nanf("");
    return absl::OkStatus();
  }

  BodyInfo info_;
};

const Identity& server_identity() {
  static const Identity identity = Identity::from_secret(fixed_key(9));
  return identity;
}

struct Keys {
  CipherState send;
  CipherState receive;
};
// As the client sees them; the server's are the other way round.
Keys keys_of(std::uint8_t client) {
  return {CipherState(kSuite, fixed_key(10 + client)), CipherState(kSuite, fixed_key(20 + client))};
}

struct FuzzState final : ServerState {
  FuzzState(Body& served, const BodyServerOptions& options)
      : ServerState(served, options, std::make_unique<ManualQueue>(served)) {}

  absl::StatusOr<NoiseTransport> shake_hands(CipherSuite suite, const std::string& message1,
                                             std::string& message2) override {
    if (real_handshake) return ServerState::shake_hands(suite, message1, message2);
    if (message1.size() != kNoiseMessage1Size) return absl::UnauthenticatedError("no message 1");
    const auto client = static_cast<std::uint8_t>(message1[0]);
    if (client > 1) return absl::PermissionDeniedError("not on the list");
    message2.assign(kNoiseMessage2Size, 'x');
    Keys keys = keys_of(client);
    NoiseTransport transport{.send = std::move(keys.receive), .receive = std::move(keys.send)};
    transport.remote_static.fill(client);
    return transport;
  }

  bool real_handshake = false;
};

// A client that knows what it asked for.
class Client {
 public:
  Client(std::uint8_t number, std::shared_ptr<FuzzState> state)
      : number_(number), real_(state->real_handshake), stream_(std::move(state)) {}

  MemoryStream& stream() { return stream_; }
  bool ended() const { return stream_.ended().has_value(); }

  void hello(Input& input) {
    v1::Envelope envelope;
    const std::uint8_t variant = input.byte();
    envelope.mutable_hello()->set_version(variant == 1 ? 2 : kProtocolVersion);
    envelope.mutable_hello()->set_cipher(variant == 2 ? static_cast<v1::Cipher>(input.byte())
                                                      : v1::CIPHER_CHACHAPOLY);
    std::string message(kNoiseMessage1Size, static_cast<char>(number_));
    if (real_) message = begin_handshake();
    if (variant == 3) message = input.bytes(input.byte());
    if (variant == 4) message[0] = static_cast<char>(input.byte());
    if (variant == 5) envelope.clear_hello();
    envelope.set_data(message);
    inbox_.push_back(std::move(envelope));
    if (!real_ && seal_ == nullptr) {
      Keys keys = keys_of(number_);
      seal_ = std::make_unique<CipherState>(std::move(keys.send));
      opener_ = std::make_unique<FrameOpener>(std::move(keys.receive));
    }
  }

  void open(Input& input) {
    OpenFrame open{.hidden_size = kHiddenSize};
    open.model_fingerprint.fill(1);
    open.cloak_commitment.fill(2);
    const std::uint8_t variant = input.byte();
    if (variant == 1) open.hidden_size = 1 + input.byte();
    if (variant == 2) open.model_fingerprint[3] = input.byte();
    if (variant == 3) open.cloak_commitment[3] = input.byte();
    ask(open, {});
  }

  void step(Input& input) {
    Asked asked{.step = true};
    StepFrame step{.session = session(input.byte())};
    const std::uint8_t positions = input.byte();
    step.start_pos = positions & 31;
    step.rows = 1 + (positions >> 5) + (input.byte() == 1 ? 1 : 0);
    const std::uint8_t kind = input.byte();
    step.wanted = static_cast<Wanted>(kind % 3);
    std::vector<float> values(step.rows * kHiddenSize, input.byte() / 4.0F);
    const auto dtype = static_cast<WireDtype>(1 + kind / 3 % 3);
    if ((kind & 0x80) != 0 && dtype == WireDtype::kF32) values.back() = INFINITY;
    step.tensor = pack_rows(dtype, values, kHiddenSize);
    if ((kind & 0x40) != 0) step.tensor.bytes.resize(input.byte());
    if ((kind & 0x20) != 0) step.tensor.lz4 = true;
    asked.session = step.session;
    asked.kv_len = step.start_pos + step.rows;
    asked.rows_back = step.wanted == Wanted::kNone   ? 0
                      : step.wanted == Wanted::kLast ? 1
                                                     : step.rows;
    asked.value = values[0] + 1;
    ask(std::move(step), asked);
  }

  void close(Input& input) { seal(encode_frame({++request_, CloseFrame{session(input.byte())}})); }

  // Any bytes as a frame, cut where the input says; as the plaintext of a record; as a record.
  void raw_frame(Input& input) {
    foreign_ = true;
    seal(input.bytes(input.byte()));
  }
  void raw_plaintext(Input& input) {
    foreign_ = true;
    std::string plaintext = input.bytes(input.byte());
    // A full piece, which the input cannot afford to spell out.
    if (plaintext.size() == 2 && plaintext[0] == 1) plaintext.resize(kNoiseMaxPayload, 'y');
    record(plaintext);
  }
  void raw_record(Input& input) {
    foreign_ = true;
    data_ += input.bytes(input.byte());
  }
  void damage(Input& input) {
    foreign_ = true;
    const std::uint8_t at = input.byte(), with = input.byte();
    if (data_.empty()) {
      data_ = last_;
    } else if (with == 0) {
      data_.resize(data_.size() - at % data_.size());
    } else {
      data_[at % data_.size()] ^= static_cast<char>(with);
    }
  }

  void flush(bool with_hello) {
    v1::Envelope envelope;
    if (with_hello) envelope.mutable_hello()->set_version(kProtocolVersion);
    if (!data_.empty()) last_ = data_;
    envelope.set_data(std::exchange(data_, {}));
    inbox_.push_back(std::move(envelope));
  }
  bool has_data() const { return !data_.empty(); }

  // ---- the stream ----

  void read() {
    if (!stream_.reading() || inbox_.empty()) return;
    stream_.complete_read(inbox_.front());
    inbox_.pop_front();
  }
  void half_close() {
    if (stream_.reading()) stream_.complete_read(std::nullopt);
  }
  void write(bool ok) {
    if (!stream_.writing()) return;
    const v1::Envelope envelope = stream_.complete_write(ok);
    if (!ok) broken_ = true;
    if (!broken_) receive(envelope);
  }
  void cancel() {
    broken_ = true;
    stream_.connection().on_cancel();
  }

  // All that a stream does before it is gone.
  void finish(ManualQueue& queue) {
    while (!ended()) {
      if (stream_.writing()) {
        write(true);
      } else if (queue.waiting() > 0) {
        queue.run(0);
      } else if (stream_.reading()) {
        half_close();
      } else {
        break;
      }
    }
    check(ended());
    stream_.close();
    check(!stream_.misused());
    check_ending();
  }

 private:
  struct Asked {
    bool step = false;
    std::uint64_t session = 0;
    std::uint32_t kv_len = 0;
    std::uint32_t rows_back = 0;
    float value = 0;
  };

  std::string begin_handshake() {
    static const std::array<Identity, 2> own = {Identity::from_secret(fixed_key(1)),
                                                Identity::from_secret(fixed_key(2))};
    handshake_ = std::make_unique<NoiseHandshake>(
        *NoiseHandshake::initiator(kSuite, bytes_of(noise_prologue(kProtocolVersion, kSuite)),
                                   own[number_], server_identity().public_key()));
    std::string message;
    check(handshake_->write_message({}, message).ok());
    return message;
  }

  std::uint64_t session(std::uint8_t which) const {
    if (sessions_.empty() || which == 0xff) return 1 + which;
    return sessions_[which % sessions_.size()];
  }

  void ask(decltype(Frame::kind) kind, const Asked& asked) {
    if (seal_ == nullptr) return;
    asked_[++request_] = asked;
    seal(encode_frame({request_, std::move(kind)}));
  }
  void seal(const std::string& frame) { record(std::string(1, '\0') + frame); }
  void record(const std::string& plaintext) {
    if (seal_ == nullptr) return;
    std::string message;
    check(seal_->encrypt({}, bytes_of(plaintext), message).ok());
    if (!plaintext.empty() && (plaintext[0] & kRekey) != 0) seal_->rekey();
    data_ += static_cast<char>(message.size() >> 8);
    data_ += static_cast<char>(message.size());
    data_ += message;
  }

  void receive(const v1::Envelope& envelope) {
    check(!envelope.has_hello());
    if (envelope.has_refusal()) {
      check(!shaken_ && envelope.refusal().versions_size() == 1);
      return;
    }
    if (!shaken_) {
      check(envelope.data().size() == kNoiseMessage2Size);
      shaken_ = true;
      if (real_) finish_handshake(envelope.data());
      return;
    }
    std::vector<std::string> frames;
    check(opener_->open(bytes_of(envelope.data()), 1 << 20, frames).ok());
    for (const std::string& bytes : frames) {
      auto frame = decode_frame(bytes_of(bytes));
      check(frame.ok());
      on_answer(*frame);
    }
  }

  void finish_handshake(const std::string& message) {
    std::string payload;
    if (!handshake_->read_message(bytes_of(message), payload).ok()) {
      broken_ = true;  // a second hello of this client replaced the first one's keys
      return;
    }
    auto transport = *handshake_->split();
    seal_ = std::make_unique<CipherState>(std::move(transport.send));
    opener_ = std::make_unique<FrameOpener>(std::move(transport.receive));
  }

  void on_answer(Frame& frame) {
    if (foreign_) return;  // it may answer bytes of the fuzzer's own
    const auto found = asked_.find(frame.request);
    check(found != asked_.end());
    const Asked asked = found->second;
    asked_.erase(found);
    if (std::holds_alternative<ErrorFrame>(frame.kind)) return;  // its code is one of five
    if (!asked.step) {
      const auto& opened = std::get<OpenedFrame>(frame.kind).session;
      check(opened.id != 0 && opened.hidden_size == kHiddenSize && opened.max_rows == kMaxRows);
      check(std::find(sessions_.begin(), sessions_.end(), opened.id) == sessions_.end());
      sessions_.push_back(opened.id);
      return;
    }
    const auto& output = std::get<OutputFrame>(frame.kind);
    check(output.kv_len == asked.kv_len && output.rows == asked.rows_back);
    // The steps of a session are run in the order in which they came.
    check(frame.request > std::exchange(last_output_[asked.session], frame.request));
    if (output.rows == 0) return;
    const auto values = unpack_rows(output.tensor, output.rows, kHiddenSize);
    check(values.ok());
    check(std::abs((*values)[0] - asked.value) <= 1);  // i8 rounds
  }

  void check_ending() const {
    const absl::Status& status = *stream_.ended();
    static const std::set<absl::StatusCode> documented = {absl::StatusCode::kOk,
                                                          absl::StatusCode::kCancelled,
                                                          absl::StatusCode::kInvalidArgument,
                                                          absl::StatusCode::kUnauthenticated,
                                                          absl::StatusCode::kPermissionDenied,
                                                          absl::StatusCode::kFailedPrecondition,
                                                          absl::StatusCode::kDeadlineExceeded,
                                                          absl::StatusCode::kDataLoss,
                                                          absl::StatusCode::kUnavailable,
                                                          absl::StatusCode::kUnimplemented,
                                                          absl::StatusCode::kResourceExhausted};
    check(documented.count(status.code()) == 1);
    // A client that said only good things, to the end, has all of its answers.
    if (status.ok() && !foreign_ && !broken_ && inbox_.empty() && data_.empty()) {
      check(asked_.empty() || !shaken_);
    }
  }

  const std::uint8_t number_;
  const bool real_;
  MemoryStream stream_;
  std::unique_ptr<NoiseHandshake> handshake_;
  std::unique_ptr<CipherState> seal_;
  std::unique_ptr<FrameOpener> opener_;
  bool shaken_ = false;             // message 2 has come
  bool foreign_ = false;            // said something that is not in asked_
  bool broken_ = false;             // lost something that the server said
  std::string data_;                // of the next envelope
  std::string last_;                // of the one before
  std::deque<v1::Envelope> inbox_;  // not read yet
  std::uint64_t request_ = 0;
  std::map<std::uint64_t, Asked> asked_;
  std::map<std::uint64_t, std::uint64_t> last_output_;  // request, by session
  std::vector<std::uint64_t> sessions_;
};

struct World {
  World() {
    BodyServerOptions options;
    options.identity = &server_identity();
    options.allow = {Identity::from_secret(fixed_key(1)).public_key(),
                     Identity::from_secret(fixed_key(2)).public_key()};
    options.max_sessions = kMaxSessions;
    options.max_sessions_per_client = 2;
    options.max_kv_bytes = kMaxPositions;
    options.max_rows_per_step = kMaxRows;
    options.max_pending_per_connection = kMaxPending;
    options.ciphers = {kSuite};
    // No alarm goes off by itself.
    options.handshake_timeout = options.first_frame_timeout = std::chrono::hours(1);
    state = std::make_shared<FuzzState>(body, options);
    queue = static_cast<ManualQueue*>(state->scheduler.get());
  }

  void check_limits() const {
    check(state->admission->sessions() <= kMaxSessions);
    check(state->admission->positions() <= kMaxPositions);
    check(body.sessions <= kMaxSessions);
    check(queue->waiting() <= connections * kMaxPending);
  }

  StubBody body;
  std::shared_ptr<FuzzState> state;
  ManualQueue* queue = nullptr;
  std::uint32_t connections = 0;  // of this input so far
};

void drain(FuzzState& state) {
  state.draining = true;
  const std::vector<std::shared_ptr<Connection>> open(state.open.begin(), state.open.end());
  for (const auto& connection : open) connection->drain();
}

void operate(World& world, std::array<std::unique_ptr<Client>, 2>& clients, Input& input) {
  const std::uint8_t op = input.byte();
  const std::size_t who = (op & 0x40) != 0 ? 1 : 0;
  if (clients[who] == nullptr) {
    ++world.connections;
    clients[who] = std::make_unique<Client>(static_cast<std::uint8_t>(who), world.state);
  }
  Client& client = *clients[who];
  switch (op & 0x1f) {
    case 0:
      client.hello(input);
      break;
    case 1:
      client.open(input);
      break;
    case 2:
      client.step(input);
      break;
    case 3:
      client.close(input);
      break;
    case 4:
      client.raw_frame(input);
      break;
    case 5:
      client.raw_plaintext(input);
      break;
    case 6:
      client.raw_record(input);
      break;
    case 7:
      client.damage(input);
      break;
    case 8:
      client.flush(false);
      break;
    case 9:
      client.flush(true);
      break;
    case 10:
      client.write(true);
      break;
    case 11:
      client.write(false);
      break;
    case 12:
      if (world.queue->waiting() > 0) world.queue->run(input.byte() % world.queue->waiting());
      break;
    case 13:
      world.body.mood = static_cast<StubBody::Mood>(input.byte() % 4);
      break;
    case 14:
      client.half_close();
      break;
    case 15:
      client.cancel();
      break;
    case 16:
      drain(*world.state);
      break;
    case 17:
      if (!client.ended()) break;
      client.finish(*world.queue);  // steps that it has left in the queue stay there
      clients[who].reset();
      break;
    default:
      client.read();
      break;
  }
  // Most operations arrive at once and are read; 0x80 keeps them for later.
  if ((op & 0x80) == 0 && clients[who] != nullptr) {
    if (client.has_data()) client.flush(false);
    if ((op & 0x20) == 0) client.read();
  }
}

}  // namespace
}  // namespace infemeral

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace infemeral;
  static World world;
  Input input(data, size);
  world.body.mood = StubBody::Mood::kWell;
  world.state->draining = false;
  world.connections = 0;
  world.state->real_handshake = size > 0 && data[0] == 0xff;
  if (world.state->real_handshake) input.byte();
  {
    std::array<std::unique_ptr<Client>, 2> clients;
    while (!input.empty()) {
      operate(world, clients, input);
      world.check_limits();
    }
    for (auto& client : clients) {
      if (client != nullptr) client->finish(*world.queue);
    }
  }
  while (world.queue->waiting() > 0) world.queue->run(0);
  // Nothing stays behind.
  check(world.state->open.empty());
  check(world.body.sessions == 0);
  check(world.state->admission->sessions() == 0 && world.state->admission->positions() == 0);
  return 0;
}
