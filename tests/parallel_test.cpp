// Many prompts at the same time over one connection: each has the tokens that it has alone.
#include <tbb/global_control.h>

#include <catch2/catch.hpp>
#include <chrono>
#include <set>

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

struct Stack {
  Stack() {
    make_tiny_model(folder.path() / "model", {.dtype = Dtype::kF16, .seed = rng()()});
    REQUIRE(prepare_model({.model_dir = folder.path() / "model",
                           .output_dir = folder.path() / "out",
                           .body_dtype = Dtype::kF16,
                           .threads = 1})
                .ok());
    auto client = ClientFolder::open(folder.path() / "out" / "client");
    REQUIRE(client.ok());
    manifest = client->manifest;
    backend = make_cpu_client_backend(*std::move(client), {.threads = 1}).value();
    body = load_cpu_body(folder.path() / "out" / "body", {.threads = 1}).value();
    server_options.identity = &server_identity;
    server_options.allow = {client_identity.public_key()};
  }
  void start() {
    server = BodyServer::start(*body, server_options).value();
    line.set_target(server->port());
    link = connect_link({.server = "127.0.0.1:" + std::to_string(line.port()),
                         .server_key = server_identity.public_key(),
                         .identity = &client_identity,
                         .model_fingerprint = manifest.model_fingerprint,
                         .cloak_commitment = manifest.cloak_commitment,
                         .hidden_size = manifest.hidden_size})
               .value();
  }
  PipelineOptions options(std::uint32_t sessions) {
    return {.sessions = sessions,
            .prefill_rows = 9,
            .max_draft = static_cast<std::uint32_t>(8 * random_index(2)),
            .retry = {.first_delay = milliseconds(2), .max_delay = milliseconds(50)},
            .log = [this](LogLevel, std::string_view words) { log.emplace_back(words); }};
  }
  GenerateRequest random_request() const {
    GenerateRequest request{
        .prompt = std::vector<std::int32_t>(1 + random_index(50)),
        .max_tokens = static_cast<std::uint32_t>(1 + random_index(24)),
        .sampling = {.temperature = random_index(2) == 0 ? 0.0f : 1.0f, .seed = rng()()}};
    for (auto& id : request.prompt)
      id = static_cast<std::int32_t>(random_index(manifest.vocab_size));
    return request;
  }

  TempFolder folder;
  ClientManifest manifest;
  const Identity server_identity = Identity::generate(), client_identity = Identity::generate();
  BodyServerOptions server_options;
  std::unique_ptr<ClientBackend> backend;
  Line line{{}};
  std::unique_ptr<Body> body;
  std::unique_ptr<BodyServer> server;
  std::unique_ptr<Link> link;
  std::vector<std::string> log;
};

// A batch, what must come of it, and what came.
struct Batch {
  Batch(Stack& stack, std::size_t n) : jobs(n), results(n), expected(n) {
    Pipeline alone(*stack.backend, *stack.link, {});
    for (std::size_t i = 0; i < n; ++i) {
      jobs[i].request = stack.random_request();
      GenerateResult result;
      REQUIRE(alone.generate(jobs[i].request, {}, {}, result).ok());
      expected[i] = result.tokens;
      jobs[i].result = &results[i];
      jobs[i].status = absl::UnknownError("never ended");
    }
  }
  absl::Status run(Pipeline& pipeline, std::stop_token stop = {}) {
    std::size_t given = 0;
    return pipeline.generate_all(
        [&] { return given < jobs.size() ? &jobs[given++] : nullptr; },
        [&](GenerateJob& job) {
          CHECK(ended.insert(static_cast<std::size_t>(&job - jobs.data())).second);
          return true;
        },
        stop);
  }
  void check_all() const {
    CHECK(ended.size() == jobs.size());
    for (std::size_t i = 0; i < jobs.size(); ++i) {
      INFO(i << " " << jobs[i].status);
      CHECK(jobs[i].status.ok());
      CHECK(results[i].tokens == expected[i]);
      CHECK(results[i].timings.size() == expected[i].size());
    }
  }
  std::vector<GenerateJob> jobs;
  std::vector<GenerateResult> results;
  std::vector<std::vector<std::int32_t>> expected;
  std::set<std::size_t> ended;
};

}  // namespace

TEST_CASE("prompts at the same time have the tokens that they have alone") {
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  Stack stack;
  stack.start();
  for (const std::uint32_t sessions : {1u, 2u, 7u, 30u}) {
    CAPTURE(sessions);
    Batch batch(stack, 40);
    Pipeline pipeline(*stack.backend, *stack.link, stack.options(sessions));
    REQUIRE(batch.run(pipeline).ok());
    batch.check_all();
    // The caches of all sessions are there for the next batch.
    Batch again(stack, 5);
    REQUIRE(again.run(pipeline).ok());
    again.check_all();
  }
  CHECK(stack.log.empty());
}

TEST_CASE("a line that breaks under many prompts loses none of them") {
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  Stack stack;
  stack.start();
  for (int round = 0; round < 6; ++round) {
    Batch batch(stack, 12);
    const std::uint64_t before = stack.link->counters().reconnects;
    std::size_t tokens = 0, total = 0;
    for (const auto& expected : batch.expected) total += expected.size();
    const std::size_t first = 1 + random_index(total / 2);
    const std::size_t second = first + random_index(total / 4 + 1);
    for (GenerateJob& job : batch.jobs) {
      job.on_token = [&](std::int32_t) {
        if (++tokens == first || tokens == second) stack.line.cut();
        return true;
      };
    }
    Pipeline pipeline(*stack.backend, *stack.link, stack.options(5));
    const absl::Status status = batch.run(pipeline);
    INFO(status);
    REQUIRE(status.ok());
    batch.check_all();
    CHECK(stack.link->counters().reconnects > before);
  }
}

TEST_CASE("a server with fewer sessions than asked for serves what it can") {
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  Stack stack;
  stack.server_options.max_sessions = 3;
  stack.start();
  Batch batch(stack, 20);
  Pipeline pipeline(*stack.backend, *stack.link, stack.options(8));
  REQUIRE(batch.run(pipeline).ok());
  batch.check_all();
  REQUIRE(stack.log.size() == 1);  // five times the same is said once
  CHECK(stack.log[0].find("fewer prompts at a time") != std::string::npos);
}

TEST_CASE("prompts whose caches do not fit the server together run as it has room") {
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  Stack stack;
  stack.start();
  Batch batch(stack, 20), more(stack, 5);
  stack.server_options.max_kv_bytes = 90 * stack.body->info().kv_bytes_per_token;
  stack.start();
  Pipeline pipeline(*stack.backend, *stack.link, stack.options(6));
  REQUIRE(batch.run(pipeline).ok());
  batch.check_all();
  // These find the memory held by what the others left.
  REQUIRE(more.run(pipeline).ok());
  more.check_all();
  REQUIRE(!stack.log.empty());
  CHECK(stack.log[0].find("fewer prompts at a time") != std::string::npos);
}

TEST_CASE("prompts that lose their session in the middle go on in another's") {
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  Stack stack;
  stack.start();
  Batch batch(stack, 14);
  std::size_t tokens = 0;
  for (GenerateJob& job : batch.jobs) {
    job.on_token = [&](std::int32_t) {
      if (++tokens == 25) {  // back with fewer sessions than there are prompts
        stack.server.reset();
        stack.line.cut();
        stack.server_options.max_sessions = 2;
        stack.server = BodyServer::start(*stack.body, stack.server_options).value();
        stack.line.set_target(stack.server->port());
      }
      return true;
    };
  }
  Pipeline pipeline(*stack.backend, *stack.link, stack.options(6));
  REQUIRE(batch.run(pipeline).ok());
  batch.check_all();
}

TEST_CASE("a job that cannot be run ends alone") {
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  Stack stack;
  stack.start();
  Batch batch(stack, 20);
  const auto vocab = static_cast<std::int32_t>(stack.manifest.vocab_size);
  batch.jobs[1].request.prompt = {};
  batch.jobs[5].request.prompt = {1, 2, vocab};  // the backend refuses it
  batch.jobs[9].request.prompt.assign(300, 1);   // beyond the context
  batch.jobs[13].request.sampling.temperature = -1;
  Pipeline pipeline(*stack.backend, *stack.link, stack.options(4));
  REQUIRE(batch.run(pipeline).ok());
  CHECK(batch.ended.size() == batch.jobs.size());
  for (const std::size_t bad : {1, 5, 9, 13}) {
    CHECK(absl::IsInvalidArgument(batch.jobs[bad].status));
    CHECK(batch.results[bad].tokens.empty());
    batch.jobs[bad].status = absl::OkStatus();
    batch.expected[bad].clear();
  }
  batch.check_all();
}

TEST_CASE("a stop, a server that is gone and a caller that has enough end all jobs") {
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  Stack stack;
  stack.start();
  Batch batch(stack, 12);
  PipelineOptions options = stack.options(4);
  options.retry.attempts = 2;
  Pipeline pipeline(*stack.backend, *stack.link, options);
  std::stop_source stop;
  std::size_t tokens = 0;
  std::function<void()> event;
  for (GenerateJob& job : batch.jobs) {
    job.request.max_tokens = 24;
    job.on_token = [&](std::int32_t) {
      if (++tokens == 20) event();
      return true;
    };
  }
  absl::StatusCode expected{};
  SECTION("stop") {
    event = [&] { stop.request_stop(); };
    expected = absl::StatusCode::kCancelled;
  }
  SECTION("gone") {
    event = [&] {
      stack.server.reset();
      stack.line.cut();
    };
    expected = absl::StatusCode::kUnavailable;
  }
  CHECK(batch.run(pipeline, stop.get_token()).code() == expected);
  for (std::size_t i = 0; i < batch.jobs.size(); ++i) {
    // Those that ran say why they did not end; those that had ended, or never began, are as before.
    const bool cut_off = batch.jobs[i].status.code() == expected;
    CHECK(cut_off == (!batch.results[i].tokens.empty() && batch.ended.count(i) == 0));
  }
}

TEST_CASE("a caller that has enough gets no more") {
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  Stack stack;
  stack.start();
  Batch batch(stack, 12);
  Pipeline pipeline(*stack.backend, *stack.link, stack.options(4));
  std::size_t given = 0, ended = 0;
  const absl::Status status = pipeline.generate_all([&] { return &batch.jobs[given++]; },
                                                    [&](GenerateJob&) { return ++ended < 3; }, {});
  CHECK(absl::IsCancelled(status));
  CHECK(ended == 3);
  // The pipeline is usable.
  Batch again(stack, 5);
  REQUIRE(again.run(pipeline).ok());
  again.check_all();
}

}  // namespace infemeral
