// Whatever breaks between client and body, the tokens are those of a run that nothing broke.
#include <tbb/global_control.h>

#include <catch2/catch.hpp>
#include <chrono>
#include <mutex>
#include <thread>

#include "cpu/body.h"
#include "cpu/client_backend.h"
#include "cpu/prepare.h"
#include "engine/pipeline.h"
#include "net/body_server.h"
#include "net/client_link.h"
#include "tests/line.h"
#include "tests/test_random.h"
#include "tests/tiny_model.h"

namespace infemeral {
namespace {

using std::chrono::milliseconds;

// The model is tiny; and ThreadSanitizer, for which the network code is run here, does not see the
// locks of Debian's oneTBB.
const tbb::global_control one_thread(tbb::global_control::max_allowed_parallelism, 1);

using Clock = std::chrono::steady_clock;

constexpr std::uint32_t kTokens = 24;

// Times are short so that the test is; the limits themselves have a test of their own.
RetryOptions quick_retry() {
  return {.attempts = 200,
          .max_time = milliseconds(60000),
          .first_delay = milliseconds(2),
          .max_delay = milliseconds(50)};
}

// One small model for all tests.
const std::filesystem::path& prepared() {
  static const TempFolder folder;
  static const std::filesystem::path out = [] {
    make_tiny_model(folder.path() / "model", {.dtype = Dtype::kF16, .seed = rng()()});
    REQUIRE(prepare_model({.model_dir = folder.path() / "model",
                           .output_dir = folder.path() / "out",
                           .body_dtype = Dtype::kF16,
                           .threads = 1})
                .ok());
    return folder.path() / "out";
  }();
  return out;
}

// A body behind a server that can be killed and started again, the line to it, and the client.
class Stack {
 public:
  Stack() {
    auto folder = ClientFolder::open(prepared() / "client");
    REQUIRE(folder.ok());
    options.server_key = server_identity.public_key();
    options.identity = &client_identity;
    options.model_fingerprint = folder->manifest.model_fingerprint;
    options.cloak_commitment = folder->manifest.cloak_commitment;
    options.hidden_size = folder->manifest.hidden_size;
    vocab = folder->manifest.vocab_size;
    auto made = make_cpu_client_backend(*std::move(folder), {.threads = 1});
    REQUIRE(made.ok());
    backend = *std::move(made);
    server_options.identity = &server_identity;
    server_options.allow = {client_identity.public_key()};
    start_server();
    options.server = "127.0.0.1:" + std::to_string(line.port());
    connect();
  }

  // With an empty cache.
  void start_server() {
    auto loaded = load_cpu_body(prepared() / "body", {.threads = 1});
    REQUIRE(loaded.ok());
    body = *std::move(loaded);
    auto started = BodyServer::start(*body, server_options);
    INFO(started.status());
    REQUIRE(started.ok());
    server = *std::move(started);
    line.set_target(server->port());
  }
  void kill_server() {
    server.reset();
    body.reset();
  }
  void connect() {
    auto connected = connect_link(options);
    INFO(connected.status());
    REQUIRE(connected.ok());
    link = *std::move(connected);
  }
  PipelineOptions pipeline_options() {
    return {.prefill_rows = 7,
            .max_draft = static_cast<std::uint32_t>(8 * random_index(2)),
            .retry = quick_retry(),
            .log = [this](LogLevel, std::string_view s) {
              const std::lock_guard lock(mutex);
              log.emplace_back(s);
            }};
  }
  // Stands in for what the kernel of a killed server's machine does.
  void kill_and_restart() {
    kill_server();
    line.cut();
    start_server();
  }

  Identity server_identity = Identity::generate();
  Identity client_identity = Identity::generate();
  BodyServerOptions server_options;
  ClientLinkOptions options;
  std::size_t vocab = 0;
  std::unique_ptr<ClientBackend> backend;
  Line line{{}};
  std::unique_ptr<Body> body;
  std::unique_ptr<BodyServer> server;
  std::unique_ptr<Link> link;
  std::mutex mutex;
  std::vector<std::string> log;
};

GenerateRequest random_request(std::size_t vocab) {
  GenerateRequest request{
      .prompt = std::vector<std::int32_t>(1 + random_index(60)),
      .max_tokens = kTokens,
      .sampling = {.temperature = random_index(2) == 0 ? 0.0f : 1.0f, .seed = rng()()}};
  for (auto& id : request.prompt) id = static_cast<std::int32_t>(random_index(vocab));
  return request;
}

std::vector<std::int32_t> unbroken(Stack& stack, const GenerateRequest& request) {
  Pipeline pipeline(*stack.backend, *stack.link, {});
  GenerateResult result;
  REQUIRE(pipeline.generate(request, {}, {}, result).ok());
  REQUIRE(result.tokens.size() == kTokens);
  return result.tokens;
}

// Ends the client's stream, and the connection no more.
std::string reset_of_stream_1() {
  return {"\0\0\4\3\0\0\0\0\1\0\0\0\2", 13};
}

// A link whose server forgets the session before the n-th step.
class ForgetfulLink final : public Link {
 public:
  explicit ForgetfulLink(Link& link) : link_(link) {}
  absl::StatusOr<SessionInfo> open_session(std::stop_token stop) override {
    ++opened;
    return link_.open_session(stop);
  }
  absl::Status step(const StepRequest& request, std::stop_token stop, StepReply& reply,
                    PhaseTimes& times) override {
    if (forget_in-- == 0) {
      link_.close_session(request.session);
      return absl::NotFoundError("the server does not have this session; open a new one");
    }
    return link_.step(request, stop, reply, times);
  }
  absl::Status reconnect(std::stop_token stop) override {
    ++reconnected;
    return link_.reconnect(stop);
  }
  void close_session(std::uint64_t session) override { link_.close_session(session); }
  LinkCounters counters() const override { return link_.counters(); }
  std::string cipher() const override { return link_.cipher(); }

  int forget_in = -1;
  int opened = 0, reconnected = 0;

 private:
  Link& link_;
};

}  // namespace

TEST_CASE("whatever breaks, at whatever token, the tokens are those of an unbroken run") {
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  Stack stack;
  const std::vector<std::pair<const char*, std::function<void()>>> breaks = {
      {"server killed, back with an empty cache", [&] { stack.kill_and_restart(); }},
      {"line cut", [&] { stack.line.cut(); }},
      {"black hole", [&] { stack.line.freeze(); }},
      {"stream reset", [&] { stack.line.inject(reset_of_stream_1()); }},
      {"damaged bytes", [&] { stack.line.damage(); }},
      {"server shut down and started again",
       [&] {
         stack.server->shutdown(milliseconds(1000));
         stack.kill_server();
         stack.start_server();
       }},
  };
  for (const auto& [name, break_it] : breaks) {
    CAPTURE(name);
    for (int round = 0; round < 4; ++round) {
      const GenerateRequest request = random_request(stack.vocab);
      stack.options.step_timeout = milliseconds(120000);
      stack.connect();
      const auto expected = unbroken(stack, request);
      // A black hole is noticed by the step's deadline; keepalive would take 15 s.
      stack.options.step_timeout = milliseconds(500);
      stack.connect();
      stack.log.clear();
      Pipeline pipeline(*stack.backend, *stack.link, stack.pipeline_options());
      // Not behind the last token, after which nothing is sent.
      const std::size_t first = 1 + random_index(kTokens - 2);
      const std::size_t second = first + random_index(kTokens - 1 - first);
      std::size_t made = 0;
      const auto on_token = [&, &break_now = break_it](std::int32_t) {
        ++made;
        if (made == first || made == second) break_now();
        return true;
      };
      GenerateResult result;
      const auto status = pipeline.generate(request, on_token, {}, result);
      INFO(status);
      REQUIRE(status.ok());
      CHECK(result.tokens == expected);
      const LinkCounters counters = stack.link->counters();
      CHECK(counters.reconnects >= 1);
      CHECK(counters.reconnects <= 2);
      CHECK(counters.handshakes == 1 + counters.reconnects);
      CHECK(result.replayed_rows >= request.prompt.size());
      // One line for each, and no other unless an attempt failed.
      const auto said = std::count_if(stack.log.begin(), stack.log.end(), [](const auto& s) {
        return s.find("connected again after") != std::string::npos;
      });
      CHECK(said == static_cast<std::ptrdiff_t>(counters.reconnects));
    }
  }
}

TEST_CASE("breaks in the middle of anything: while a prompt is sent, while a session is opened") {
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  Stack stack;
  for (int round = 0; round < 12; ++round) {
    const GenerateRequest request = random_request(stack.vocab);
    stack.options.step_timeout = milliseconds(120000);
    stack.connect();
    const auto expected = unbroken(stack, request);
    stack.options.step_timeout = milliseconds(1000);
    stack.options.connect_timeout = milliseconds(1000);
    stack.connect();
    Pipeline pipeline(*stack.backend, *stack.link, stack.pipeline_options());
    const int breaks = 1 + static_cast<int>(random_index(6));
    std::vector<std::pair<milliseconds, bool>> plan;
    for (int i = 0; i < breaks; ++i) {
      plan.emplace_back(milliseconds(random_index(12)), random_index(5) == 0);
    }
    std::thread breaker([&] {
      for (const auto& [pause, freeze] : plan) {
        std::this_thread::sleep_for(pause);
        freeze ? stack.line.freeze() : stack.line.cut();
      }
    });
    GenerateResult result;
    const auto status = pipeline.generate(request, {}, {}, result);
    breaker.join();
    INFO(status);
    REQUIRE(status.ok());
    CHECK(result.tokens == expected);
  }
}

TEST_CASE("a session that the server forgot is opened again on the same connection") {
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  Stack stack;
  const GenerateRequest request = random_request(stack.vocab);
  const auto expected = unbroken(stack, request);
  ForgetfulLink link(*stack.link);
  Pipeline pipeline(*stack.backend, link, stack.pipeline_options());
  link.forget_in = static_cast<int>(random_index(kTokens - 1));
  GenerateResult result;
  REQUIRE(pipeline.generate(request, {}, {}, result).ok());
  CHECK(result.tokens == expected);
  CHECK(link.opened == 2);
  CHECK(link.reconnected == 0);
}

TEST_CASE("a server that does not come back: a typed error within the limits, and later it works") {
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  Stack stack;
  const GenerateRequest request = random_request(stack.vocab);
  const auto expected = unbroken(stack, request);
  PipelineOptions options = stack.pipeline_options();
  absl::Status status;
  GenerateResult result;
  const auto on_token = [&](std::int32_t) {
    if (result.tokens.size() == 5) {
      stack.kill_server();
      stack.line.cut();
    }
    return true;
  };
  const auto begin = Clock::now();
  std::string words;
  SECTION("attempts") {
    options.retry.attempts = 3;
    words = "gave up after 3 attempts";
  }
  SECTION("time") {
    options.retry.max_time = milliseconds(700);
    options.retry.first_delay = milliseconds(200);
    words = "gave up after";
  }
  SECTION("none") {
    options.retry.attempts = 0;
    words = "connection to";
  }
  Pipeline pipeline(*stack.backend, *stack.link, options);
  status = pipeline.generate(request, on_token, {}, result);
  INFO(status);
  CHECK(absl::IsUnavailable(status));
  CHECK(std::string(status.message()).find(words) != std::string::npos);
  CHECK(Clock::now() - begin < milliseconds(10000));
  CHECK(result.tokens == std::vector<std::int32_t>(expected.begin(), expected.begin() + 5));

  stack.start_server();
  if (options.retry.attempts == 0) REQUIRE(stack.link->reconnect({}).ok());
  REQUIRE(pipeline.generate(request, {}, {}, result).ok());
  CHECK(result.tokens == expected);
}

TEST_CASE("a stop while the server is away ends the wait at once") {
  Stack stack;
  PipelineOptions options = stack.pipeline_options();
  options.retry.first_delay = options.retry.max_delay = milliseconds(50000);
  Pipeline pipeline(*stack.backend, *stack.link, options);
  std::stop_source stop;
  std::thread stopper;
  GenerateResult result;
  const auto begin = Clock::now();
  const auto on_token = [&](std::int32_t) {
    if (result.tokens.size() == 2) {
      stack.kill_server();
      stack.line.cut();
      stopper = std::thread([&] {
        std::this_thread::sleep_for(milliseconds(100));
        stop.request_stop();
      });
    }
    return true;
  };
  const auto status = pipeline.generate({.prompt = {1, 2, 3}, .max_tokens = kTokens}, on_token,
                                        stop.get_token(), result);
  stopper.join();
  CHECK(absl::IsCancelled(status));
  CHECK(result.tokens.size() == 2);
  CHECK(Clock::now() - begin < milliseconds(10000));
}

TEST_CASE("a server that comes back without this client's key is not asked again") {
  Stack stack;
  Pipeline pipeline(*stack.backend, *stack.link, stack.pipeline_options());
  GenerateResult result;
  const auto on_token = [&](std::int32_t) {
    if (result.tokens.size() == 2) {
      stack.server_options.allow = {Identity::generate().public_key()};
      stack.kill_and_restart();
    }
    return true;
  };
  const auto status =
      pipeline.generate({.prompt = {1, 2, 3}, .max_tokens = kTokens}, on_token, {}, result);
  CHECK(absl::IsPermissionDenied(status));
  CHECK(result.tokens.size() == 2);
}

TEST_CASE("a server that still holds the session of the dead line is waited for") {
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  Stack stack;
  stack.kill_server();
  stack.server_options.max_sessions = 1;
  stack.start_server();
  stack.options.step_timeout = milliseconds(500);
  stack.connect();
  const GenerateRequest request = random_request(stack.vocab);
  const auto expected = unbroken(stack, request);
  Pipeline pipeline(*stack.backend, *stack.link, stack.pipeline_options());
  GenerateResult result;
  std::thread noticer;
  const auto on_token = [&](std::int32_t) {
    if (result.tokens.size() == 3) {
      // The server does not hear of the dead line before the relay tells it.
      stack.line.freeze();
      const auto connections = stack.server->counters().connections;
      noticer = std::thread([&stack, connections] {
        while (stack.server->counters().connections == connections) {
          std::this_thread::sleep_for(milliseconds(5));
        }
        std::this_thread::sleep_for(milliseconds(200));
        stack.line.cut();
      });
    }
    return true;
  };
  const auto status = pipeline.generate(request, on_token, {}, result);
  if (noticer.joinable()) noticer.join();
  INFO(status);
  REQUIRE(status.ok());
  CHECK(result.tokens == expected);
}

TEST_CASE("a full server is waited for, as long as the caller likes") {
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  Stack stack;
  stack.kill_server();
  stack.server_options.max_sessions = 1;
  stack.start_server();
  stack.connect();
  const GenerateRequest request = random_request(stack.vocab);
  std::optional<Pipeline> first(std::in_place, *stack.backend, *stack.link, PipelineOptions{});
  GenerateResult expected;
  REQUIRE(first->generate(request, {}, {}, expected).ok());

  auto second = connect_link(stack.options);
  REQUIRE(second.ok());
  GenerateResult result;
  Pipeline impatient(*stack.backend, **second, {.retry = {.attempts = 0}});
  CHECK(absl::IsResourceExhausted(impatient.generate(request, {}, {}, result)));
  Pipeline patient(*stack.backend, **second, stack.pipeline_options());
  std::thread leaver([&first] {
    std::this_thread::sleep_for(milliseconds(100));
    first.reset();
  });
  const absl::Status status = patient.generate(request, {}, {}, result);
  leaver.join();
  INFO(status);
  CHECK(status.ok());
  CHECK(result.tokens == expected.tokens);
  const std::lock_guard lock(stack.mutex);
  REQUIRE(stack.log.size() == 1);
  CHECK(stack.log[0].find("waiting") != std::string::npos);
}

TEST_CASE("delays double up to their limit, are spread, and end with the reason") {
  Retry retry({.attempts = 5,
               .max_time = milliseconds(60000),
               .first_delay = milliseconds(8),
               .max_delay = milliseconds(30)});
  for (const int most : {8, 16, 30, 30, 30}) {
    const auto begin = Clock::now();
    REQUIRE(retry.wait(absl::UnavailableError("gone"), {}).ok());
    CHECK(Clock::now() - begin >= milliseconds(most / 2));
  }
  const absl::Status status = retry.wait(absl::DeadlineExceededError("slow"), {});
  CHECK(absl::IsDeadlineExceeded(status));
  CHECK(std::string(status.message()).find("slow; gave up after 5 attempts") == 0);
  for (const auto code : {absl::StatusCode::kUnavailable, absl::StatusCode::kDeadlineExceeded,
                          absl::StatusCode::kDataLoss}) {
    CHECK(is_broken_line(absl::Status(code, "")));
  }
  for (const auto code : {absl::StatusCode::kOk, absl::StatusCode::kPermissionDenied,
                          absl::StatusCode::kInternal, absl::StatusCode::kCancelled}) {
    CHECK(!is_broken_line(absl::Status(code, "")));
  }
}

}  // namespace infemeral
