// A server under a mixed load for a quarter of an hour: short and long prompts on every wire
// format, many at a time, over lines that break now and then, among idle clients, clients that come
// and go and connections that lead nowhere. Do all tokens stay those of an unbroken run alone, and
// does memory stay as it is, at both ends?
//
// usage: mixed_soak SERVER_COMMAND [SECONDS]
#include <malloc.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include "cpu/client_backend.h"
#include "engine/pipeline.h"
#include "engine/text.h"
#include "net/client_link.h"
#include "tests/line.h"
#include "tests/server_process.h"
#include "tests/visitor.h"

namespace infemeral {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr std::uint32_t kContext = 1024;
// Of the whole run: thread pools, allocators and gRPC's caches reach their size in it.
constexpr double kWarmUp = 0.5;
constexpr double kMaxDrift = 0.01;
// How often, at most, all leave but those who are idle, so that memory can be compared: what
// sessions hold in between is the load's own coming and going.
constexpr int kRests = 45;

// Who generates: so many prompts at a time over one line, in one wire format.
struct Role {
  WireDtype wire;
  std::uint32_t sessions;
  bool breaks;  // its line is cut every few seconds, and swallows everything once in a while
};
constexpr Role kRoles[] = {{WireDtype::kF16, 6, true},
                           {WireDtype::kI8, 4, true},
                           {WireDtype::kF16, 1, false},
                           {WireDtype::kF32, 2, false}};
constexpr std::size_t kGenerators = std::size(kRoles);
constexpr std::size_t kIdleClient = kGenerators, kVisitor = kGenerators + 1,
                      kClients = kGenerators + 2;
constexpr std::size_t kCases = 40, kHalfOpen = 40;

template <typename T>
T value(absl::StatusOr<T> result) {
  if (!result.ok()) throw std::runtime_error(result.status().ToString());
  return *std::move(result);
}

std::unique_ptr<ClientBackend> open_backend(const Deployment& deployment) {
  return value(make_cpu_client_backend(value(ClientFolder::open(deployment.client_folder())),
                                       {.threads = 1}));
}

// Prompts and what must come of them.
struct Cases {
  std::vector<GenerateRequest> requests;
  std::vector<std::vector<std::int32_t>> expected;
};

// One at a time over a line that nothing breaks.
Cases make_cases(const Deployment& deployment, int port, std::size_t client, WireDtype wire) {
  const auto backend = open_backend(deployment);
  const auto link = value(connect_link(deployment.link_options(port, client)));
  Pipeline alone(*backend, *link, {.wire = wire});
  std::mt19937_64 random(std::random_device{}());
  Cases cases;
  for (std::size_t i = 0; i < kCases; ++i) {
    const bool is_long = i % 5 == 0;
    GenerateRequest request{
        .prompt = std::vector<std::int32_t>(is_long ? 200 + random() % 600 : 1 + random() % 40),
        .max_tokens = static_cast<std::uint32_t>(4 + random() % 60),
        .sampling = {.temperature = random() % 2 ? 1.0f : 0.0f, .seed = random()}};
    for (auto& id : request.prompt) {
      id = static_cast<std::int32_t>(random() % deployment.manifest().vocab_size);
    }
    GenerateResult result;
    const absl::Status status = alone.generate(request, {}, {}, result);
    if (!status.ok()) throw std::runtime_error(status.ToString());
    cases.requests.push_back(std::move(request));
    cases.expected.push_back(std::move(result.tokens));
  }
  return cases;
}

// Without what the allocator keeps for later: its arenas, one for each few threads, fill slowly.
double kib_in_use() {
  const auto info = ::mallinfo2();
  return static_cast<double>(info.uordblks + info.hblkhd) / 1024;
}

class Soak {
 public:
  Soak(const std::string& server, seconds duration)
      : duration_(duration),
        deployment_(server,
                    // Of a size at which 1 % is more than the heap of gRPC's own breathes.
                    {.hidden = 1024,
                     .layers = 4,
                     .heads = 8,
                     .head_dim = 64,
                     .intermediate = 4096,
                     .vocab = 16384,
                     .max_context = kContext,
                     .dtype = Dtype::kF16,
                     .seed = std::random_device{}()},
                    kClients),
        server_(deployment_) {}

  int run() {
    for (std::size_t i = 0; i < kGenerators; ++i) {
      cases_.push_back(make_cases(deployment_, server_.port(), i, kRoles[i].wire));
      generators_.push_back(std::make_unique<Generator>(deployment_, server_.port()));
    }
    const auto begin = Clock::now();
    std::vector<std::thread> threads;
    for (std::size_t i = 0; i < kGenerators; ++i) {
      threads.emplace_back([this, i] { again_and_again([&] { generate(i); }); });
    }
    Visitor visitor(deployment_, server_.port(), kVisitor);
    threads.emplace_back([&] { again_and_again([&] { come_and_go(visitor); }); });
    const int n_resting = static_cast<int>(threads.size());
    threads.emplace_back([this] { again_and_again([&] { idle(); }); });
    threads.emplace_back([this] { again_and_again([&] { lead_nowhere(); }); });
    std::vector<ProcessUsage> server, client;
    std::vector<double> in_use;
    while (Clock::now() < begin + duration_ && !over()) {
      std::this_thread::sleep_for(duration_ / kRests);
      resting_ = true;
      while (n_away_ < n_resting && !over()) {
        std::this_thread::sleep_for(milliseconds(10));
      }
      std::this_thread::sleep_for(milliseconds(300));  // the server learns of it
      server.push_back(usage_of(server_.pid()));
      client.push_back(usage_of(::getpid()));
      in_use.push_back(kib_in_use());
      resting_ = false;
    }
    over_ = true;
    for (std::thread& thread : threads) thread.join();
    const bool flat_server = report("server", server), flat_client = report("client", client);
    in_use.erase(in_use.begin(), in_use.begin() + static_cast<std::ptrdiff_t>(in_use.size() / 2));
    if (!in_use.empty()) {
      std::printf(
          "client's own count of what it has allocated: from %.0f to %.0f KiB, trend "
          "%+.0f KiB\n",
          in_use.front(), in_use.back(), growth(in_use));
    }
    std::printf(
        "%lu prompts, %lu tokens; %lu lines cut, %lu black holes, %lu reconnects; %lu idle "
        "clients, %lu visitors, %lu half-open connections ended by the server\n",
        n(prompts_), n(tokens_), n(cuts_), n(holes_), n(reconnects_), n(idle_), n(visits_),
        n(ended_));
    if (!failure_.empty()) std::printf("FAILED: %s\n", failure_.c_str());
    std::printf("%lu of %lu prompts had the tokens of the unbroken run\n", n(same_), n(prompts_));
    return failure_.empty() && same_ == prompts_ && flat_server && flat_client ? 0 : 1;
  }

 private:
  struct Generator {
    Generator(const Deployment& deployment, int port)
        : backend(open_backend(deployment)), line({.target = port}) {}
    const std::unique_ptr<ClientBackend> backend;
    Line line;
    std::mt19937_64 random{std::random_device{}()};
    Clock::time_point cut = Clock::now(), hole = cut + seconds(30);  // the next ones
  };

  static unsigned long n(const std::atomic<std::uint64_t>& count) { return count; }
  bool over() const { return over_; }
  bool leaves() const { return over_ || resting_; }
  // Does `work`, which returns when leaves() says so, until it is over.
  void again_and_again(const std::function<void()>& work) {
    try {
      while (!over()) {
        work();
        ++n_away_;
        while (resting_ && !over()) std::this_thread::sleep_for(milliseconds(10));
        --n_away_;
      }
    } catch (const std::exception& error) {
      const std::lock_guard lock(mutex_);
      failure_ = error.what();
      over_ = true;
    }
  }

  // Batches of random cases.
  void generate(std::size_t role) {
    const Cases& cases = cases_[role];
    Generator& own = *generators_[role];
    std::mt19937_64& random = own.random;
    const auto link = value(connect_link(deployment_.link_options(own.line.port(), role)));
    Pipeline pipeline(
        *own.backend, *link,
        {.wire = kRoles[role].wire, .sessions = kRoles[role].sessions, .prefill_rows = 64});
    while (!leaves()) {
      std::vector<std::size_t> which(1 + random() % 6);
      for (std::size_t& i : which) i = random() % kCases;
      std::vector<GenerateJob> jobs(which.size());
      std::vector<GenerateResult> results(jobs.size());
      for (std::size_t i = 0; i < jobs.size(); ++i) {
        jobs[i].request = cases.requests[which[i]];
        jobs[i].result = &results[i];
        jobs[i].on_token = [&](std::int32_t) {
          if (kRoles[role].breaks) break_line(own);
          return true;
        };
      }
      std::size_t given = 0;
      const absl::Status status =
          pipeline.generate_all([&] { return given < jobs.size() ? &jobs[given++] : nullptr; },
                                [](GenerateJob&) { return true; }, {});
      if (!status.ok()) throw std::runtime_error(status.ToString());
      for (std::size_t i = 0; i < jobs.size(); ++i) {
        if (!jobs[i].status.ok()) throw std::runtime_error(jobs[i].status.ToString());
        ++prompts_;
        tokens_ += results[i].tokens.size();
        if (results[i].tokens == cases.expected[which[i]]) {
          ++same_;
        } else {
          std::printf("DIFFERENT: role %zu, case %zu\n", role, which[i]);
        }
      }
      std::this_thread::sleep_for(milliseconds(random() % 100));
    }
    reconnects_ += link->counters().reconnects;
  }

  // When it is time.
  void break_line(Generator& own) {
    if (Clock::now() > own.cut) {
      own.line.cut();
      ++cuts_;
      own.cut = Clock::now() + milliseconds(2000 + own.random() % 8000);
    } else if (Clock::now() > own.hole) {
      own.line.freeze();
      ++holes_;
      own.hole = Clock::now() + seconds(60 + own.random() % 120);
    }
  }

  // Connects, does nothing for a while, and then finds everything as it was.
  void idle() {
    std::mt19937_64 random(std::random_device{}());
    while (!over()) {
      const auto link = value(connect_link(deployment_.link_options(server_.port(), kIdleClient)));
      const SessionInfo session = value(link->open_session({}));
      const std::vector<float> row(session.hidden_size, 0.5f);
      std::vector<std::byte> tensor(wire_row_bytes(WireDtype::kF16, session.hidden_size));
      encode_wire_row(WireDtype::kF16, row, tensor.data());
      PhaseTimes times;
      StepReply first, again;
      const StepRequest request{.session = session.id, .rows = 1, .tensor = tensor};
      absl::Status status = link->step(request, {}, first, times);
      const auto until = Clock::now() + seconds(20 + random() % 40);
      while (!over() && Clock::now() < until) std::this_thread::sleep_for(milliseconds(200));
      if (status.ok()) status = link->step(request, {}, again, times);
      if (!status.ok()) throw std::runtime_error(status.ToString());
      if (first.tensor != again.tensor) throw std::runtime_error("an idle session has changed");
      ++idle_;
    }
  }

  void come_and_go(Visitor& visitor) {
    while (!leaves()) {
      visitor.visit();
      ++visits_;
      std::this_thread::sleep_for(milliseconds(200));
    }
  }

  void lead_nowhere() {
    HalfOpenCrowd crowd(server_.port(), kHalfOpen);
    while (!over()) crowd.keep_up(milliseconds(100));
    ended_ = crowd.reopened();
  }

  // True when there was no drift.
  bool report(const char* who, const std::vector<ProcessUsage>& samples) const {
    const auto warm = static_cast<std::size_t>(kWarmUp * static_cast<double>(samples.size()));
    std::vector<double> rss, anonymous;
    for (std::size_t i = 0; i < samples.size(); ++i) {
      if (i % 3 == 2) {
        std::printf(
            "%s at rest %2zu: %6.0f KiB resident (%.0f anonymous), %d descriptors, %d "
            "threads\n",
            who, i + 1, samples[i].rss_kib, samples[i].anonymous_kib, samples[i].descriptors,
            samples[i].threads);
      }
      if (i < warm) continue;
      rss.push_back(samples[i].rss_kib);
      anonymous.push_back(samples[i].anonymous_kib);
    }
    if (rss.empty()) return false;
    const double drift = growth(rss) / rss.front();
    std::printf(
        "%s over the last %.0f s: from %.0f to %.0f KiB; trend %+.0f KiB (%+.2f %%), "
        "anonymous memory by %+.0f KiB\n",
        who, (1 - kWarmUp) * static_cast<double>(duration_.count()), rss.front(), rss.back(),
        growth(rss), 100 * drift, growth(anonymous));
    return drift < kMaxDrift;
  }

  const seconds duration_;
  const Deployment deployment_;
  ServerProcess server_;
  std::vector<Cases> cases_;
  std::vector<std::unique_ptr<Generator>> generators_;
  std::atomic<bool> resting_ = false, over_ = false;
  std::atomic<int> n_away_ = 0;
  std::mutex mutex_;
  std::string failure_;
  std::atomic<std::uint64_t> prompts_ = 0, same_ = 0, tokens_ = 0, cuts_ = 0, holes_ = 0,
                             reconnects_ = 0, idle_ = 0, visits_ = 0, ended_ = 0;
};

}  // namespace
}  // namespace infemeral

int main(int argc, char** argv) {
  using namespace infemeral;
  const int given = argc == 3 ? std::atoi(argv[2]) : 900;
  if (argc < 2 || argc > 3 || given < 45) {
    std::fprintf(stderr, "usage: mixed_soak SERVER_COMMAND [SECONDS, at least 45]\n");
    return 2;
  }
  try {
    raise_descriptor_limit();
    return Soak(argv[1], std::chrono::seconds(given)).run();
  } catch (const std::exception& error) {
    std::printf("FAILED: %s\n", error.what());
    return 1;
  }
}
