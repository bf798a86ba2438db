#include "engine/pipeline.h"
#include "tests/test_random.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <cstring>
#include <deque>
#include <limits>
#include <map>
#include <numeric>
#include <thread>

namespace infemeral {
namespace {

constexpr std::size_t kHidden = 8;
constexpr std::int32_t kVocab = 101;

std::vector<std::int32_t> random_prompt(std::size_t n) {
  std::vector<std::int32_t> prompt(n);
  for (auto& id : prompt) id = static_cast<std::int32_t>(rng()() % kVocab);
  return prompt;
}

// The toy model: the next token is a hash of all tokens so far.
std::int32_t next_of(const std::vector<std::int32_t>& ids) {
  std::uint32_t hash = 2166136261u;
  for (std::int32_t id : ids) hash = (hash ^ static_cast<std::uint32_t>(id)) * 16777619u;
  return static_cast<std::int32_t>(hash % kVocab);
}

// One that repeats itself, and breaks off now and then.
std::int32_t repetitive_next_of(const std::vector<std::int32_t>& ids) {
  const std::int32_t now_and_then = ids.size() % 23 == 0;
  return (3 * ids.back() + 7 * ids.front() + now_and_then) % 13;
}

using Model = std::int32_t (*)(const std::vector<std::int32_t>&);

std::vector<std::int32_t> expected_tokens(std::vector<std::int32_t> ids, std::size_t n,
                                          Model model = next_of) {
  std::vector<std::int32_t> tokens;
  for (std::size_t i = 0; i < n; ++i) {
    tokens.push_back(model(ids));
    ids.push_back(tokens.back());
  }
  return tokens;
}

// Element 0 of a row carries the id on its way out and the next id on its way back.
class ToyBackend final : public ClientBackend {
 public:
  std::string_view name() const override { return "toy"; }
  std::size_t hidden_size() const override { return kHidden; }
  std::size_t vocab_size() const override { return kVocab; }
  MemoryUse memory() const override { return {}; }

  absl::Status embed(std::span<const std::int32_t> ids, WireDtype dtype, std::span<std::byte> out,
                     PhaseTimes& times) override {
    const std::size_t row_bytes = wire_row_bytes(dtype, kHidden);
    if (out.size() != ids.size() * row_bytes) return absl::InternalError("size");
    for (std::size_t i = 0; i < ids.size(); ++i) {
      if (ids[i] < 0 || ids[i] >= kVocab) return absl::InvalidArgumentError("token id");
      float row[kHidden] = {static_cast<float>(ids[i])};
      encode_wire_row(dtype, row, out.data() + i * row_bytes);
    }
    times.embed_ms += 1;
    return absl::OkStatus();
  }
  absl::Status next_tokens(std::span<const std::byte> rows, WireDtype dtype,
                           std::span<const SampleRequest> requests, std::span<std::int32_t> tokens,
                           PhaseTimes& times) override {
    const std::size_t row_bytes = wire_row_bytes(dtype, kHidden);
    if (requests.size() != tokens.size() || rows.size() != requests.size() * row_bytes) {
      return absl::InternalError("size");
    }
    for (std::size_t i = 0; i < requests.size(); ++i) {
      float row[kHidden];
      decode_wire_row(dtype, rows.data() + i * row_bytes, row);
      tokens[i] = static_cast<std::int32_t>(row[0]);
      positions.push_back(requests[i].position);
      if (requests[i].history.size() != requests[i].position) return absl::InternalError("history");
    }
    times.sample_ms += 1;
    return absl::OkStatus();
  }
  absl::Status logits(std::span<const std::byte>, WireDtype, std::span<float>) override {
    return absl::UnimplementedError("toy");
  }

  std::vector<std::uint64_t> positions;
};

class ToyLink : public Link {
 public:
  absl::StatusOr<SessionInfo> open_session(std::stop_token) override {
    ++opened;
    return SessionInfo{.id = ++last_session_,
                       .hidden_size = kHidden,
                       .max_context = context,
                       .max_rows = max_rows,
                       .body = "toy"};
  }
  absl::Status step(const StepRequest& request, std::stop_token stop, StepReply& reply,
                    PhaseTimes& times) override {
    if (before_step) before_step();
    if (stop.stop_requested()) return absl::CancelledError("stopped");
    if (!fail_next.ok()) return std::exchange(fail_next, absl::OkStatus());
    auto& ids = caches_[request.session];
    if (request.start_pos > ids.size()) return absl::InvalidArgumentError("gap");
    if (request.start_pos + request.rows > context) return absl::InvalidArgumentError("context");
    if (request.rows > max_rows) return absl::InvalidArgumentError("rows");
    ids.resize(request.start_pos);
    const std::size_t row_bytes = wire_row_bytes(request.dtype, kHidden);
    reply.tensor.clear();
    for (std::size_t i = 0; i < request.rows; ++i) {
      float row[kHidden];
      decode_wire_row(request.dtype, request.tensor.data() + i * row_bytes, row);
      ids.push_back(static_cast<std::int32_t>(row[0]));
      if (request.wanted == Wanted::kNone ||
          (request.wanted == Wanted::kLast && i + 1 < request.rows)) {
        continue;
      }
      const float next[kHidden] = {static_cast<float>(model(ids))};
      reply.tensor.resize(reply.tensor.size() + row_bytes, std::byte{0xFF});
      encode_wire_row(request.dtype, next, reply.tensor.data() + reply.tensor.size() - row_bytes);
    }
    std::size_t held = 0;
    for (const auto& [session, cache] : caches_) held += cache.size();
    most_held = std::max(most_held, held);
    rows_sent += request.rows;
    rows_of_steps.push_back(request.rows);
    reply.kv_len = static_cast<std::uint32_t>(ids.size());
    reply.rows = static_cast<std::uint32_t>(reply.tensor.size() / row_bytes);
    if (tamper) tamper(reply);
    times.network_ms += 1;
    return absl::OkStatus();
  }
  void close_session(std::uint64_t session) override { caches_.erase(session); }
  LinkCounters counters() const override { return {}; }
  std::string cipher() const override { return "none"; }

  Model model = next_of;
  std::uint32_t context = 64;
  std::uint32_t max_rows = 16;
  std::function<void()> before_step;
  std::function<void(StepReply&)> tamper;
  absl::Status fail_next;
  int opened = 0;
  std::size_t rows_sent = 0;
  std::size_t most_held = 0;  // positions, over all sessions
  std::vector<std::uint32_t> rows_of_steps;

 private:
  std::uint64_t last_session_ = 0;
  std::map<std::uint64_t, std::vector<std::int32_t>> caches_;
};

// Counts what is on its way.
class CountingLink final : public ToyLink {
 public:
  absl::Status submit(const StepRequest& request, std::stop_token stop,
                      PhaseTimes& times) override {
    const absl::Status status = ToyLink::submit(request, stop, times);
    if (!status.ok()) return status;
    out_.push_back(request.tensor.size());
    const std::size_t bytes = std::accumulate(out_.begin(), out_.end(), std::size_t{0});
    most_bytes = std::max(most_bytes, bytes);
    most_steps = std::max(most_steps, out_.size());
    return status;
  }
  absl::Status await(std::stop_token stop, StepReply& reply, PhaseTimes& times) override {
    out_.pop_front();
    return ToyLink::await(stop, reply, times);
  }

  std::size_t most_bytes = 0, most_steps = 0;

 private:
  std::deque<std::size_t> out_;
};

struct Toy {
  ToyBackend backend;
  ToyLink link;
  Pipeline pipeline{backend, link, {.wire = WireDtype::kF32, .prefill_rows = 5}};

  GenerateResult run(const std::vector<std::int32_t>& prompt, std::uint32_t n) {
    GenerateResult result;
    const auto status = pipeline.generate({.prompt = prompt, .max_tokens = n}, {}, {}, result);
    REQUIRE(status.ok());
    return result;
  }
};

}  // namespace

TEST_CASE("tokens are the model's, whatever the chunks and whatever is cached") {
  for (std::uint32_t chunk : {1u, 2u, 7u, 1000u}) {
    Toy toy;
    Pipeline pipeline(toy.backend, toy.link, {.wire = WireDtype::kF32, .prefill_rows = chunk});
    std::vector<std::int32_t> prompt;
    for (int round = 0; round < 20; ++round) {
      // Sometimes a fresh prompt, sometimes one that shares a prefix with the last.
      if (round % 3 == 0) {
        prompt = random_prompt(1 + rng()() % 40);
      } else {
        prompt.resize(1 + rng()() % prompt.size());
        for (std::int32_t id : random_prompt(rng()() % 5)) prompt.push_back(id);
      }
      GenerateResult result;
      REQUIRE(pipeline.generate({.prompt = prompt, .max_tokens = 9}, {}, {}, result).ok());
      CHECK(result.tokens == expected_tokens(prompt, 9));
      CHECK(result.finish == FinishReason::kLength);
    }
    CHECK(toy.link.opened == 1);
  }
}

TEST_CASE("guesses change no token and spare steps") {
  const auto run = [](std::uint32_t max_draft, std::uint32_t chunk, std::uint32_t sessions) {
    ToyBackend backend;
    ToyLink link;
    link.model = repetitive_next_of;
    link.context = 90;
    Pipeline pipeline(backend, link,
                      {.wire = WireDtype::kF32,
                       .sessions = sessions,
                       .prefill_rows = chunk,
                       .max_draft = max_draft});
    std::vector<GenerateJob> jobs(30);
    std::vector<GenerateResult> results(jobs.size());
    std::vector<std::vector<std::int32_t>> expected(jobs.size());
    for (std::size_t i = 0; i < jobs.size(); ++i) {
      GenerateRequest& request = jobs[i].request;
      request = {.prompt = random_prompt(1 + rng()() % 40),
                 .max_tokens = static_cast<std::uint32_t>(1 + rng()() % 100)};
      if (i % 3 == 1) request.prompt = jobs[i - 1].request.prompt;
      const std::size_t room = link.context - request.prompt.size() + 1;
      expected[i] = expected_tokens(request.prompt, std::min<std::size_t>(request.max_tokens, room),
                                    repetitive_next_of);
      if (i % 4 == 1) {
        const auto end = expected[i].begin() + static_cast<int>(rng()() % expected[i].size());
        request.end_tokens = {*end};
        expected[i].erase(std::find(expected[i].begin(), end, *end) + 1, expected[i].end());
      } else if (i % 4 == 2) {
        expected[i].resize(1 + rng()() % expected[i].size());
        jobs[i].on_token = [&results, i, n = expected[i].size()](std::int32_t) {
          return results[i].tokens.size() < n;
        };
      }
      jobs[i].result = &results[i];
    }
    std::size_t given = 0;
    REQUIRE(pipeline
                .generate_all([&] { return given < jobs.size() ? &jobs[given++] : nullptr; },
                              [](GenerateJob&) { return true; }, {})
                .ok());
    std::uint64_t drafted = 0, accepted = 0;
    std::size_t tokens = 0;
    for (std::size_t i = 0; i < jobs.size(); ++i) {
      CAPTURE(i, max_draft, chunk, sessions);
      CHECK(jobs[i].status.ok());
      CHECK(results[i].tokens == expected[i]);
      CHECK(results[i].timings.size() == expected[i].size());
      CHECK(results[i].accepted <= results[i].drafted);
      drafted += results[i].drafted;
      accepted += results[i].accepted;
      tokens += expected[i].size();
    }
    CHECK((drafted > 0) == (max_draft > 0 && chunk > 1));
    // Some are right, some are not; a step without guesses brings one token.
    CHECK((accepted > 0) == (drafted > 0));
    CHECK((accepted < drafted) == (drafted > 0));
    return static_cast<double>(backend.positions.size() - drafted) / static_cast<double>(tokens);
  };
  for (const std::uint32_t sessions : {1u, 4u}) {
    CHECK(run(0, 16, sessions) == 1);
    CHECK(run(8, 1, sessions) == 1);
    CHECK(run(1, 16, sessions) < 0.8);
    CHECK(run(8, 5, sessions) < 0.6);
    CHECK(run(8, 16, sessions) < 0.5);
    CHECK(run(1000, 1000, sessions) < 0.5);
  }
}

TEST_CASE("guesses whose session is lost are made anew") {
  ToyBackend backend;
  ToyLink link;
  link.model = repetitive_next_of;
  link.context = 200;
  Pipeline pipeline(backend, link,
                    {.wire = WireDtype::kF32,
                     .max_draft = 8,
                     .retry = {.first_delay = std::chrono::milliseconds(0)}});
  for (int round = 0; round < 100; ++round) {
    const auto prompt = random_prompt(1 + rng()() % 10);
    link.before_step = [&link, left = rng()() % 20]() mutable {
      if (left-- == 0) link.fail_next = absl::NotFoundError("restarted");
    };
    GenerateResult result;
    REQUIRE(pipeline.generate({.prompt = prompt, .max_tokens = 120}, {}, {}, result).ok());
    CHECK(result.tokens == expected_tokens(prompt, 120, repetitive_next_of));
    CHECK(result.accepted > 0);
  }
  CHECK(link.opened > 50);
}

TEST_CASE("a shared prefix is not sent again") {
  Toy toy;
  const auto prompt = random_prompt(30);
  toy.run(prompt, 3);
  CHECK(toy.link.rows_sent == 30 + 2);  // the last token chosen is never sent

  toy.link.rows_sent = 0;
  const GenerateResult again = toy.run(prompt, 1);
  CHECK(toy.link.rows_sent == 1);  // its output is what is asked for
  CHECK(again.cached_rows == 29);
}

TEST_CASE("a long prompt fills the line with as many bytes as it may") {
  constexpr std::size_t kRowBytes = sizeof(float) * kHidden;
  constexpr std::size_t kEndless = std::size_t{1} << 30;
  for (const std::size_t bytes : {std::size_t{0}, 110 * kRowBytes, kEndless}) {
    ToyBackend backend;
    CountingLink link;
    link.context = 3000;
    link.max_rows = 50;
    Pipeline pipeline(backend, link, {.wire = WireDtype::kF32, .bytes_in_flight = bytes});
    const auto prompt = random_prompt(2000);
    GenerateResult result;
    REQUIRE(pipeline.generate({.prompt = prompt, .max_tokens = 2}, {}, {}, result).ok());
    CHECK(result.tokens == expected_tokens(prompt, 2));
    const bool one_step = bytes == 0;
    CHECK(link.most_bytes <= (one_step ? 50 * kRowBytes : bytes));
    // Two of 50 rows, or at the end three of 32.
    CHECK(link.most_steps == (one_step ? 1u : bytes == kEndless ? Link::kMaxInFlight : 3u));
  }
}

TEST_CASE("positions in KV caches are counted over all sessions at once") {
  for (std::uint32_t sessions : {1u, 3u}) {
    Toy toy;
    Pipeline pipeline(toy.backend, toy.link,
                      {.wire = WireDtype::kF32, .sessions = sessions, .prefill_rows = 5});
    std::vector<GenerateResult> results(7);
    std::vector<GenerateJob> jobs(results.size());
    std::size_t given = 0, done = 0, longest = 0;
    for (std::size_t i = 0; i < jobs.size(); ++i) {
      jobs[i].request = {.prompt = random_prompt(20 + rng()() % 20), .max_tokens = 9};
      jobs[i].result = &results[i];
      longest = std::max(longest, jobs[i].request.prompt.size() + 9 - 1);
    }
    const auto next = [&] { return given < jobs.size() ? &jobs[given++] : nullptr; };
    const auto ended = [&](GenerateJob& job) {
      CHECK(job.status.ok());
      ++done;
      return true;
    };
    REQUIRE(pipeline.generate_all(next, ended, {}).ok());
    CHECK(done == jobs.size());
    CHECK(pipeline.peak_kv_positions() == toy.link.most_held);
    if (sessions == 1) CHECK(pipeline.peak_kv_positions() == longest);
    if (sessions > 1) CHECK(pipeline.peak_kv_positions() > longest);
  }
}

TEST_CASE("a long prompt begins and ends with small steps, a short one is one step") {
  Toy toy;
  toy.link.context = 1000;
  toy.link.max_rows = 200;
  Pipeline pipeline(toy.backend, toy.link, {.wire = WireDtype::kF32, .prefill_rows = 150});
  auto steps_for = [&, first_id = 0](std::size_t rows) mutable {
    toy.link.rows_of_steps.clear();
    auto prompt = random_prompt(rows);
    prompt[0] = ++first_id;  // nothing is shared with the last one
    GenerateResult result;
    REQUIRE(pipeline.generate({.prompt = prompt, .max_tokens = 1}, {}, {}, result).ok());
    CHECK(result.tokens == expected_tokens(prompt, 1));
    CHECK(result.cached_rows == 0);
    return toy.link.rows_of_steps;
  };
  using Steps = std::vector<std::uint32_t>;
  CHECK(steps_for(150) == Steps{150});
  CHECK(steps_for(151) == Steps{32, 32, 32, 32, 23});
  CHECK(steps_for(600) == Steps{32, 64, 128, 128, 64, 64, 32, 32, 32, 24});
}

TEST_CASE("generation ends at an end token, by the caller, or at the end of the context") {
  Toy toy;
  const auto prompt = random_prompt(10);
  const auto tokens = expected_tokens(prompt, 6);

  GenerateResult result;
  REQUIRE(
      toy.pipeline
          .generate({.prompt = prompt, .max_tokens = 50, .end_tokens = {tokens[4]}}, {}, {}, result)
          .ok());
  CHECK(result.finish == FinishReason::kEndToken);
  CHECK(result.tokens.back() == tokens[4]);
  CHECK(result.tokens.size() <= 5);

  REQUIRE(toy.pipeline
              .generate(
                  {.prompt = prompt, .max_tokens = 50},
                  [n = 0](std::int32_t) mutable { return ++n < 3; }, {}, result)
              .ok());
  CHECK(result.finish == FinishReason::kCaller);
  CHECK(result.tokens == expected_tokens(prompt, 3));

  REQUIRE(toy.pipeline.generate({.prompt = prompt, .max_tokens = 500}, {}, {}, result).ok());
  CHECK(result.finish == FinishReason::kLength);
  CHECK(result.tokens.size() == toy.link.context - prompt.size() + 1);
}

TEST_CASE("positions given to the sampler count from the prompt's start") {
  Toy toy;
  toy.run(random_prompt(7), 3);
  CHECK(toy.backend.positions == std::vector<std::uint64_t>{7, 8, 9});
}

TEST_CASE("prompts that cannot be run are refused and leave the pipeline usable") {
  Toy toy;
  GenerateResult result;
  const auto refused = [&](GenerateRequest request) {
    return absl::IsInvalidArgument(toy.pipeline.generate(request, {}, {}, result));
  };
  CHECK(refused({}));
  CHECK(refused({.prompt = random_prompt(65)}));
  CHECK(refused({.prompt = {1, kVocab}}));
  CHECK(refused({.prompt = {1}, .sampling = {.temperature = -1}}));
  // The last token takes no place in the context.
  for (const std::size_t rows : {63u, 64u}) {
    const auto prompt = random_prompt(rows);
    CHECK(toy.run(prompt, 5).tokens == expected_tokens(prompt, 65 - rows));
  }
}

TEST_CASE("an error of the link keeps the tokens so far, and the next call opens a new session") {
  Toy toy;
  const auto prompt = random_prompt(10);
  GenerateResult result;
  const auto on_token = [&, n = 0](std::int32_t) mutable {
    if (++n == 4) toy.link.fail_next = absl::UnavailableError("gone");
    return true;
  };
  CHECK(absl::IsUnavailable(
      toy.pipeline.generate({.prompt = prompt, .max_tokens = 9}, on_token, {}, result)));
  CHECK(result.tokens == expected_tokens(prompt, 4));
  CHECK(toy.run(prompt, 9).tokens == expected_tokens(prompt, 9));
  CHECK(toy.link.opened == 2);
}

TEST_CASE("an answer that does not fit the question is refused") {
  for (auto tamper :
       {+[](StepReply& reply) { reply.rows = 2; }, +[](StepReply& reply) { reply.rows = 0; },
        +[](StepReply& reply) { ++reply.kv_len; }}) {
    Toy toy;
    toy.link.tamper = tamper;
    GenerateResult result;
    CHECK(absl::IsDataLoss(
        toy.pipeline.generate({.prompt = {1, 2}, .max_tokens = 2}, {}, {}, result)));
  }
}

TEST_CASE("a session that is open already is used, unless it does not fit") {
  Toy toy;
  const SessionInfo session = *toy.link.open_session({});
  SessionInfo foreign = session;
  foreign.hidden_size = kHidden + 1;
  CHECK(absl::IsFailedPrecondition(toy.pipeline.adopt(foreign)));
  REQUIRE(toy.pipeline.adopt(session).ok());
  const auto prompt = random_prompt(10);
  CHECK(toy.run(prompt, 5).tokens == expected_tokens(prompt, 5));
  CHECK(toy.link.opened == 1);
}

TEST_CASE("a stop request ends the generation between steps and inside one") {
  Toy toy;
  const auto prompt = random_prompt(10);
  std::stop_source stop;
  GenerateResult result;
  const auto on_token = [&](std::int32_t) { return stop.request_stop(); };
  CHECK(absl::IsCancelled(toy.pipeline.generate({.prompt = prompt, .max_tokens = 9}, on_token,
                                                stop.get_token(), result)));
  CHECK(result.tokens == expected_tokens(prompt, 1));

  std::stop_source inside;
  toy.link.before_step = [&] { inside.request_stop(); };
  CHECK(absl::IsCancelled(toy.pipeline.generate({.prompt = random_prompt(3), .max_tokens = 9}, {},
                                                inside.get_token(), result)));
  toy.link.before_step = nullptr;
  CHECK(toy.run(prompt, 9).tokens == expected_tokens(prompt, 9));
}

TEST_CASE("every token has a timing, the first holds the prefill") {
  Toy toy;
  const GenerateResult result = toy.run(random_prompt(12), 4);
  REQUIRE(result.timings.size() == 4);
  CHECK(result.timings[0].phases.network_ms == 3);  // 12 rows in chunks of 5
  for (std::size_t i = 1; i < 4; ++i) {
    CHECK(result.timings[i].phases.sum() == 3);  // one of each: embed, network, sample
    CHECK(result.timings[i].total_ms >= 0);
  }
  CHECK(result.ttft_ms > 0);
  CHECK(result.e2el_ms >= result.ttft_ms);
}

}  // namespace infemeral
