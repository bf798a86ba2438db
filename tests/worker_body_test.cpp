// engine_serve's end of the socket to a worker: what a worker is told, and that nothing it says is
// believed unseen. The worker here is a thread of the test.
#include "tools/worker_body.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <cstring>
#include <future>
#include <thread>
#include <vector>

#include "tests/test_random.h"
#include "tools/network_wait.h"

namespace infemeral {
namespace {

constexpr std::uint32_t kHidden = 5, kMaxRows = 4, kContext = 100;

WorkerHello good_hello() {
  WorkerHello hello{.hidden_size = kHidden, .max_context = kContext, .kv_bytes_per_token = 24};
  hello.model_fingerprint[31] = 7;
  hello.cloak_commitment[0] = 9;
  return hello;
}

std::string bytes_of_hello(const WorkerHello& hello, std::string_view description) {
  std::string bytes(reinterpret_cast<const char*>(&hello), sizeof hello);
  return bytes.append(description);
}

// The other end of the socket.
class Worker {
 public:
  Worker() {
    int ends[2];
    REQUIRE(::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) == 0);
    socket_ = ends[0];
    theirs = ends[1];
  }
  ~Worker() {
    leave();
    if (data_ != nullptr) ::munmap(data_, layout.size);
  }

  void leave() {
    if (socket_ >= 0) ::close(std::exchange(socket_, -1));
  }
  void say(const void* data, std::size_t size) { ::send(socket_, data, size, MSG_NOSIGNAL); }
  void answer(std::uint32_t count, std::uint64_t number) {
    const WorkerMessage message{WorkerMessage::kRan, count, number};
    say(&message, sizeof message);
  }
  void say(const std::string& bytes) { say(bytes.data(), bytes.size()); }

  // Kind 0 when the server has ended the connection.
  WorkerMessage hear() {
    WorkerMessage message;
    return ::recv(socket_, &message, sizeof message, 0) == sizeof message ? message
                                                                          : WorkerMessage{};
  }

  WorkerSetup take_setup() {
    WorkerSetup setup{.magic = 0};
    iovec part{&setup, sizeof setup};
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))];
    msghdr header{};
    header.msg_iov = &part;
    header.msg_iovlen = 1;
    header.msg_control = control;
    header.msg_controllen = sizeof control;
    if (::recvmsg(socket_, &header, 0) != sizeof setup) return setup;
    int descriptor = -1;
    std::memcpy(&descriptor, CMSG_DATA(CMSG_FIRSTHDR(&header)), sizeof descriptor);
    can_shrink = ::ftruncate(descriptor, 0) == 0;
    void* data = ::mmap(nullptr, layout.size, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    if (data != MAP_FAILED) data_ = static_cast<std::byte*>(data);
    ::close(descriptor);
    return setup;
  }

  template <typename T>
  T& at(std::size_t part, std::size_t index) {
    return reinterpret_cast<T*>(data_ + part)[index];
  }
  WorkerStep& step(std::size_t i) { return at<WorkerStep>(0, i); }
  WorkerResult& result(std::size_t i) { return at<WorkerResult>(layout.results, i); }
  float& state(std::size_t i) { return at<float>(layout.states, i); }
  float& out(std::size_t i) { return at<float>(layout.out, i); }

  // Answers every run with the states times -1, until the server ends. The numbers of the runs'
  // steps, and the sessions that were released, are kept.
  void obey() {
    for (WorkerMessage message = hear(); message.kind != 0; message = hear()) {
      if (message.kind == WorkerMessage::kRelease) {
        released.push_back(message.number);
        continue;
      }
      runs.emplace_back();
      std::size_t row = 0;
      for (std::size_t i = 0; i < message.count; ++i) {
        const WorkerStep given = step(i);
        runs.back().push_back(given.rows);
        const std::size_t back = output_rows(static_cast<Wanted>(given.wanted), given.rows);
        for (std::size_t j = 0; j < back * kHidden; ++j) {
          out(row * kHidden + j) = -state((row + given.rows - back) * kHidden + j);
        }
        result(i) = {.code = 0, .kv_len = given.start_pos + given.rows};
        row += given.rows;
      }
      answer(message.count, message.number);
    }
  }

  const WorkerLayout layout{kMaxRows, kHidden};
  int theirs = -1;
  bool can_shrink = false;
  std::vector<std::vector<std::uint32_t>> runs;
  std::vector<std::uint64_t> released;

 private:
  int socket_ = -1;
  std::byte* data_ = nullptr;
};

// A body, and what it has said of its worker's end.
struct Served {
  explicit Served(Worker& worker, const WorkerHello& hello = good_hello()) {
    worker.say(bytes_of_hello(hello, "llama in a test"));
    auto opened = open_worker_body(
        worker.theirs, {.max_rows = kMaxRows, .on_end = [this](const absl::Status& status) {
                          end.set_value(status.code());
                        }});
    REQUIRE(opened.ok());
    body = *std::move(opened);
    setup = worker.take_setup();
  }

  std::promise<absl::StatusCode> end;
  std::unique_ptr<Body> body;
  WorkerSetup setup;
};

struct Step {
  Step(Body& body, std::uint32_t rows, Wanted wanted)
      : session(*body.new_session()),
        states(normals(rows * kHidden)),
        out(output_rows(wanted, rows) * kHidden, 1e9f),
        step{.session = session.get(),
             .start_pos = 0,
             .rows = rows,
             .states = states,
             .wanted = wanted,
             .out = out} {}

  std::unique_ptr<BodySession> session;
  std::vector<float> states, out;
  BodyStep step;
};

}  // namespace

TEST_CASE("a worker's body: rows there and back, few ones first, and as many at a time as fit") {
  Worker worker;
  Served served(worker);
  CHECK(served.setup.magic == kWorkerMagic);
  CHECK(served.setup.max_rows == kMaxRows);
  CHECK(served.setup.area_bytes == worker.layout.size);
  CHECK_FALSE(worker.can_shrink);
  const BodyInfo& info = served.body->info();
  CHECK(info.description == "llama in a test");
  CHECK(info.hidden_size == kHidden);
  CHECK(info.max_context == kContext);
  CHECK(info.kv_bytes_per_token == 24);
  CHECK(info.model_fingerprint == good_hello().model_fingerprint);
  CHECK(info.cloak_commitment == good_hello().cloak_commitment);

  std::thread thread([&] { worker.obey(); });
  std::vector<Step> steps;
  for (const auto& [rows, wanted] : {std::pair{3u, Wanted::kAll},
                                     {1u, Wanted::kLast},
                                     {4u, Wanted::kLast},
                                     {1u, Wanted::kAll},
                                     {2u, Wanted::kNone},
                                     {5u, Wanted::kLast}}) {
    steps.emplace_back(*served.body, rows, wanted);
  }
  std::vector<BodyStep> given;
  for (const Step& step : steps) given.push_back(step.step);
  served.body->run(given);
  CHECK(absl::IsInvalidArgument(given.back().status));  // more rows than there is room for
  for (std::size_t i = 0; i + 1 < steps.size(); ++i) {
    CAPTURE(i);
    CHECK(given[i].status.ok());
    CHECK(steps[i].session->kv_len() == given[i].rows);
    CHECK(steps[i].session->kv_bytes() == 24 * given[i].rows);
    std::vector<float> expected(steps[i].states.end() - static_cast<long>(steps[i].out.size()),
                                steps[i].states.end());
    for (float& value : expected) value = -value;
    CHECK(steps[i].out == expected);
  }
  steps.clear();
  served.body.reset();
  thread.join();
  CHECK(worker.runs == std::vector<std::vector<std::uint32_t>>{{1, 1, 2}, {3}, {4}});
  // The last one never ran: the worker does not know it.
  CHECK(worker.released == std::vector<std::uint64_t>{1, 2, 3, 4, 5});
  CHECK(served.end.get_future().wait_for(std::chrono::seconds(0)) == std::future_status::timeout);
}

TEST_CASE("a worker's body: the network is waited for awake while a device decodes") {
  for (std::uint32_t spares : {0u, 1u}) {
    CAPTURE(spares);
    stay_awake_until({});
    Worker worker;
    WorkerHello hello = good_hello();
    hello.spares_processors = spares;
    Served served(worker, hello);
    std::thread thread([&] { worker.obey(); });
    const auto run = [&](std::uint32_t rows) {
      Step step(*served.body, rows, Wanted::kLast);
      served.body->run({&step.step, 1});
      CHECK(step.step.status.ok());
    };
    run(2);  // no session that decodes
    CHECK(awake_until() == std::chrono::steady_clock::time_point());
    const auto before = std::chrono::steady_clock::now();
    run(1);
    CHECK((awake_until() > before) == (spares == 1));
    served.body.reset();
    thread.join();
  }
  stay_awake_until({});
}

TEST_CASE("a worker's body: steps that are refused") {
  Worker worker, another;
  Served served(worker), other(another);
  Step stranger(*other.body, 1, Wanted::kLast);
  Step good(*served.body, 2, Wanted::kAll);
  std::vector<BodyStep> steps(6, good.step);
  steps[0].session = stranger.session.get();
  steps[1].session = nullptr;
  steps[2].rows = 0;
  steps[3].states = steps[3].states.first(kHidden);
  steps[4].out = steps[4].out.first(kHidden);
  steps[5].wanted = Wanted::kLast;
  served.body->run(steps);
  for (std::size_t i = 0; i < steps.size(); ++i) {
    CAPTURE(i);
    CHECK(absl::IsInvalidArgument(steps[i].status));
  }
  // The worker has heard of none of them.
  good.session.reset();
  stranger.session.reset();
  served.body.reset();
  CHECK(worker.hear().kind == 0);
}

TEST_CASE("a worker's body: a step's error is its own") {
  Worker worker;
  Served served(worker);
  std::thread thread([&] {
    const WorkerMessage run = worker.hear();
    worker.result(0) = {.code = 8, .kv_len = 3};
    std::memset(worker.result(0).message, 'm', sizeof worker.result(0).message);
    worker.result(1) = {.code = 0, .kv_len = 1};
    for (std::size_t i = 0; i < kHidden; ++i) worker.out(kHidden + i) = 2;
    worker.answer(2, run.number);
    worker.obey();
  });
  Step full(*served.body, 1, Wanted::kLast), fits(*served.body, 1, Wanted::kLast);
  std::vector<BodyStep> steps{full.step, fits.step};
  served.body->run(steps);
  CHECK(absl::IsResourceExhausted(steps[0].status));
  CHECK(steps[0].status.message() == std::string(sizeof(WorkerResult::message), 'm'));
  CHECK(full.session->kv_len() == 3);
  CHECK(steps[1].status.ok());
  CHECK(fits.out == std::vector<float>(kHidden, 2));
  full.session.reset();
  fits.session.reset();
  served.body.reset();
  thread.join();
}

TEST_CASE("a worker's body: answers that make no sense end it") {
  using Answer = std::function<void(Worker&, WorkerMessage)>;
  const auto [what, answer] = GENERATE(table<std::string, Answer>({
      {"too short", [](Worker& w, WorkerMessage m) { w.say(&m, sizeof m - 1); }},
      {"too long",
       [](Worker& w, WorkerMessage m) {
         m.kind = WorkerMessage::kRan;
         w.say(std::string(reinterpret_cast<const char*>(&m), sizeof m) + "x");
       }},
      {"another kind", [](Worker& w, WorkerMessage m) { w.say(&m, sizeof m); }},
      {"another count",
       [](Worker& w, WorkerMessage m) {
         w.answer(m.count + 1, m.number);
       }},
      {"an endless count",
       [](Worker& w, WorkerMessage m) { w.answer(0xffffffff, m.number); }},
      {"another run",
       [](Worker& w, WorkerMessage m) { w.answer(m.count, m.number + 1); }},
      {"too many positions",
       [](Worker& w, WorkerMessage m) {
         w.result(1).kv_len = 3;
         w.answer(m.count, m.number);
       }},
      {"too many positions after an error",
       [](Worker& w, WorkerMessage m) {
         w.result(1) = {.code = 13, .kv_len = kContext + 1};
         w.answer(m.count, m.number);
       }},
      {"a code that is none",
       [](Worker& w, WorkerMessage m) {
         w.result(1).code = 77;
         w.answer(m.count, m.number);
       }},
      {"a code that is not a step's",
       [](Worker& w, WorkerMessage m) {
         w.result(1).code = 14;
         w.answer(m.count, m.number);
       }},
      {"nothing", [](Worker& w, WorkerMessage) { w.leave(); }},
  }));
  CAPTURE(what);
  Worker worker;
  Served served(worker);
  Step first(*served.body, 1, Wanted::kLast), second(*served.body, 2, Wanted::kLast);
  WorkerMessage after{.kind = 99};
  std::thread thread([&, answer = answer, what = what] {
    const WorkerMessage run = worker.hear();
    worker.result(0) = {.code = 0, .kv_len = 1};
    worker.result(1) = {.code = 0, .kv_len = 2};
    answer(worker, run);
    if (what != "nothing") after = worker.hear();
  });
  std::vector<BodyStep> steps{first.step, second.step};
  served.body->run(steps);
  thread.join();
  CHECK(absl::IsUnavailable(steps[1].status));
  if (what != "nothing") CHECK(after.kind == 0);  // the worker is told by the socket's end
  CHECK(served.end.get_future().get() ==
        (what == "nothing" ? absl::StatusCode::kUnavailable : absl::StatusCode::kDataLoss));
  // It does not come back, and says its end once: a second one would break the promise.
  steps = {first.step};
  served.body->run(steps);
  CHECK(absl::IsUnavailable(steps[0].status));
}

TEST_CASE("a worker's body: a worker that ends while nobody asks it is noticed") {
  Worker worker;
  Served served(worker);
  worker.leave();
  CHECK(served.end.get_future().get() == absl::StatusCode::kUnavailable);
}

TEST_CASE("a worker's body: a hello that makes no sense") {
  WorkerHello other = good_hello();
  other.magic ^= 1;
  WorkerHello newer = good_hello();
  ++newer.version;
  WorkerHello empty = good_hello();
  empty.hidden_size = 0;
  WorkerHello wide = good_hello();
  wide.hidden_size = 65537;
  WorkerHello closed = good_hello();
  closed.max_context = 0;
  const auto [bytes, code] = GENERATE_COPY(table<std::string, absl::StatusCode>({
      {bytes_of_hello(good_hello(), "").substr(1), absl::StatusCode::kDataLoss},
      {"x", absl::StatusCode::kDataLoss},
      {bytes_of_hello(good_hello(), std::string(513, 'x')), absl::StatusCode::kDataLoss},
      {bytes_of_hello(good_hello(), std::string(5000, 'x')), absl::StatusCode::kDataLoss},
      {bytes_of_hello(other, "x"), absl::StatusCode::kDataLoss},
      {bytes_of_hello(newer, "x"), absl::StatusCode::kFailedPrecondition},
      {bytes_of_hello(empty, "x"), absl::StatusCode::kDataLoss},
      {bytes_of_hello(wide, "x"), absl::StatusCode::kDataLoss},
      {bytes_of_hello(closed, "x"), absl::StatusCode::kDataLoss},
      {"", absl::StatusCode::kUnavailable},  // it leaves without a word
  }));
  Worker worker;
  if (bytes.empty()) {
    worker.leave();
  } else {
    worker.say(bytes);
  }
  const auto body = open_worker_body(worker.theirs, {.max_rows = kMaxRows});
  INFO(body.status());
  CHECK(body.status().code() == code);
}

TEST_CASE("a worker's body: a descriptor that is no worker's socket") {
  CHECK(absl::IsInvalidArgument(open_worker_body(-1, {}).status()));
  const int null = ::open("/dev/null", O_RDWR | O_CLOEXEC);
  CHECK(absl::IsInvalidArgument(open_worker_body(null, {}).status()));
  CHECK(::close(null) == 0);  // it is still the caller's
}

}  // namespace infemeral
