// Hundreds of breaks between a client and real server processes: do the tokens stay those of a run
// that nothing broke, how soon is a break noticed, and does anything hang?
//
// usage: resume_soak [--no-black-holes] SERVER_COMMAND [BREAKS_IN_PERCENT [WORKERS]]
//
// The command is split at spaces: build/release/tools/engine_serve, or "python -B
// tools/serve_torch".
#include <signal.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <random>
#include <stdexcept>
#include <thread>

#include "cpu/client_backend.h"
#include "engine/pipeline.h"
#include "engine/text.h"
#include "net/client_link.h"
#include "tests/line.h"
#include "tests/server_process.h"

namespace infemeral {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr std::uint32_t kTokens = 64;
// After a break the history is sent in other steps than before. engine_serve computes the same bits
// then; PyTorch's last bits differ, and no rounding to 16 bits makes more of that.
constexpr WireDtype kWire = WireDtype::kF32;
// Far beyond what one break may take: detection in 15 s, then back-off and replay.
constexpr std::chrono::seconds kHang{90};

enum class Break { kKill, kCut, kHole, kRestart, kReset, kDamage };
struct Kind {
  Break what;
  const char* name;
  int runs;
};
constexpr std::array<Kind, 6> kKinds = {{{Break::kKill, "server killed", 200},
                                         {Break::kCut, "line cut", 50},
                                         {Break::kHole, "black hole", 50},
                                         {Break::kRestart, "server restarted", 50},
                                         {Break::kReset, "stream reset", 50},
                                         {Break::kDamage, "bytes damaged", 50}}};

template <typename T>
T value(absl::StatusOr<T> result) {
  if (!result.ok()) throw std::runtime_error(result.status().ToString());
  return *std::move(result);
}

double ms_between(Clock::time_point begin, Clock::time_point end) {
  return std::chrono::duration<double, std::milli>(end - begin).count();
}

// Notes when the real link first says that it is broken.
class WatchedLink final : public Link {
 public:
  explicit WatchedLink(Link& link) : link_(link) {}
  absl::StatusOr<SessionInfo> open_session(std::stop_token stop) override {
    return link_.open_session(stop);
  }
  absl::Status step(const StepRequest& request, std::stop_token stop, StepReply& reply,
                    PhaseTimes& times) override {
    return noted(link_.step(request, stop, reply, times));
  }
  absl::Status submit(const StepRequest& request, std::stop_token stop,
                      PhaseTimes& times) override {
    return noted(link_.submit(request, stop, times));
  }
  absl::Status await(std::stop_token stop, StepReply& reply, PhaseTimes& times) override {
    return noted(link_.await(stop, reply, times));
  }
  absl::Status reconnect(std::stop_token stop) override { return link_.reconnect(stop); }
  void close_session(std::uint64_t session) override { link_.close_session(session); }
  LinkCounters counters() const override { return link_.counters(); }
  std::string cipher() const override { return link_.cipher(); }

  Clock::time_point broken{};

 private:
  absl::Status noted(absl::Status status) {
    if (!status.ok() && broken == Clock::time_point{}) broken = Clock::now();
    return status;
  }
  Link& link_;
};

struct Tally {
  int runs = 0, same = 0;
  std::uint64_t reconnects = 0, replayed = 0;
  std::vector<double> noticed_ms, back_ms;
};

class Soak {
 public:
  Soak(const Deployment& deployment, int percent, bool black_holes) : deployment_(deployment) {
    for (const Kind& kind : kKinds) {
      if (kind.what == Break::kHole && !black_holes) continue;
      for (int i = 0; i < std::max(1, kind.runs * percent / 100); ++i) work_.push_back(kind.what);
    }
    std::shuffle(work_.begin(), work_.end(), std::mt19937_64(std::random_device{}()));
  }

  int run(int n_workers) {
    std::vector<std::thread> workers;
    started_.resize(static_cast<std::size_t>(n_workers));
    for (int i = 0; i < n_workers; ++i) workers.emplace_back([this, i] { work(i); });
    while (!all_done()) {
      std::this_thread::sleep_for(milliseconds(200));
      const std::lock_guard lock(mutex_);
      for (const auto start : started_) {
        if (start != Clock::time_point{} && Clock::now() - start > kHang) {
          std::printf("HANG: a run has not ended after %ld s\n", static_cast<long>(kHang.count()));
          std::fflush(stdout);
          std::_Exit(1);
        }
      }
    }
    for (std::thread& worker : workers) worker.join();
    return report();
  }

 private:
  bool all_done() {
    const std::lock_guard lock(mutex_);
    return n_workers_done_ == static_cast<int>(started_.size());
  }

  void work(int index) {
    try {
      work_until_done(index);
    } catch (const std::exception& error) {
      const std::lock_guard lock(mutex_);
      failed_ = error.what();
    }
    const std::lock_guard lock(mutex_);
    started_[static_cast<std::size_t>(index)] = {};
    ++n_workers_done_;
  }

  void work_until_done(int index) {
    const auto backend = value(make_cpu_client_backend(
        value(ClientFolder::open(deployment_.client_folder())), {.threads = 1}));
    ServerProcess server(deployment_);
    Line line({.target = server.port()});
    const ClientLinkOptions options = deployment_.link_options(line.port());
    std::mt19937_64 random(std::random_device{}());

    while (true) {
      Break what{};
      {
        const std::lock_guard lock(mutex_);
        if (work_.empty() || !failed_.empty()) return;
        what = work_.back();
        work_.pop_back();
        started_[static_cast<std::size_t>(index)] = Clock::now();
      }
      GenerateRequest request{
          .prompt = std::vector<std::int32_t>(1 + random() % 80),
          .max_tokens = kTokens,
          .sampling = {.temperature = random() % 2 ? 1.0f : 0.0f, .seed = random()}};
      for (auto& id : request.prompt)
        id = static_cast<std::int32_t>(random() % deployment_.manifest().vocab_size);
      GenerateResult expected;
      {  // from the same server, past the line
        const auto direct = value(connect_link(deployment_.link_options(server.port())));
        Pipeline unbroken(*backend, *direct, {.wire = kWire});
        const absl::Status status = unbroken.generate(request, {}, {}, expected);
        if (!status.ok()) throw std::runtime_error(status.ToString());
      }

      const auto link = value(connect_link(options));
      WatchedLink watched(*link);
      Pipeline pipeline(*backend, watched,
                        {.wire = kWire, .prefill_rows = 16, .max_draft = random() % 2 ? 8u : 0u});
      const std::size_t at = random() % (kTokens / 2);
      const auto pause = std::chrono::microseconds(random() % 3000);
      const auto away = milliseconds(random() % 200);
      Clock::time_point broken{}, back{};
      std::thread breaker;
      // Between two steps, or in the middle of one.
      const auto break_it = [&, aside = random() % 2 == 0](bool wait) {
        const auto act = [&, wait] {
          if (wait) std::this_thread::sleep_for(pause);
          broken = Clock::now();
          switch (what) {
            case Break::kKill:
            case Break::kRestart:
              server.end(what == Break::kKill ? SIGKILL : SIGTERM);
              std::this_thread::sleep_for(away);
              server.start();
              line.set_target(server.port());
              break;
            case Break::kCut:
              line.cut();
              break;
            case Break::kHole:
              line.freeze();
              break;
            case Break::kReset:
              line.inject({"\0\0\4\3\0\0\0\0\1\0\0\0\2", 13});
              break;
            case Break::kDamage:
              line.damage();
              break;
          }
        };
        if (aside || what == Break::kKill || what == Break::kRestart) {
          breaker = std::thread([&, act] {
            try {
              act();
            } catch (const std::exception& error) {
              const std::lock_guard lock(mutex_);
              failed_ = error.what();
            }
          });
        } else {
          act();
        }
      };
      if (at == 0) break_it(true);
      GenerateResult result;
      const auto on_token = [&, n = std::size_t{0}](std::int32_t) mutable {
        if (watched.broken != Clock::time_point{} && back == Clock::time_point{}) {
          back = Clock::now();
        }
        if (++n == at) break_it(random() % 2 == 0);
        return true;
      };
      const absl::Status status = pipeline.generate(request, on_token, {}, result);
      if (breaker.joinable()) breaker.join();

      const std::lock_guard lock(mutex_);
      Tally& tally = tallies_[what];
      const LinkCounters counters = link->counters();
      const bool same = status.ok() && result.tokens == expected.tokens;
      if (same && counters.reconnects == 0) {  // the break came too late for this run
        work_.insert(work_.begin(), what);
        continue;
      }
      ++tally.runs;
      if (same) {
        ++tally.same;
      } else {
        std::printf("DIFFERENT after %s at token %zu: %s\n", name_of(what), at,
                    status.ToString().c_str());
      }
      tally.reconnects += counters.reconnects;
      tally.replayed += result.replayed_rows;
      tally.noticed_ms.push_back(ms_between(broken, watched.broken));
      tally.back_ms.push_back(ms_between(broken, back));
    }
  }

  static const char* name_of(Break what) {
    return std::find_if(kKinds.begin(), kKinds.end(), [&](const Kind& k) { return k.what == what; })
        ->name;
  }

  int report() {
    int runs = 0, same = 0;
    std::printf("%-17s %5s %5s %10s %9s %17s %17s\n", "break", "runs", "same", "reconnects",
                "replayed", "noticed ms", "next token ms");
    std::printf("%-17s %5s %5s %10s %9s %8s %8s %8s %8s\n", "", "", "", "", "positions", "median",
                "max", "median", "max");
    for (const Kind& kind : kKinds) {
      Tally& tally = tallies_[kind.what];
      runs += tally.runs;
      same += tally.same;
      const auto median = [](std::vector<double>& ms) {
        std::sort(ms.begin(), ms.end());
        return ms.empty() ? 0 : ms[ms.size() / 2];
      };
      const auto most = [](const std::vector<double>& ms) { return ms.empty() ? 0 : ms.back(); };
      const double noticed = median(tally.noticed_ms), back = median(tally.back_ms);
      std::printf("%-17s %5d %5d %10lu %9lu %8.0f %8.0f %8.0f %8.0f\n", kind.name, tally.runs,
                  tally.same, static_cast<unsigned long>(tally.reconnects),
                  static_cast<unsigned long>(tally.replayed), noticed, most(tally.noticed_ms), back,
                  most(tally.back_ms));
    }
    if (!failed_.empty()) std::printf("FAILED: %s\n", failed_.c_str());
    std::printf("%d of %d runs ended with the tokens of the unbroken run\n", same, runs);
    return same == runs && failed_.empty() ? 0 : 1;
  }

  const Deployment& deployment_;
  std::mutex mutex_;
  std::vector<Break> work_;
  std::map<Break, Tally> tallies_;
  std::vector<Clock::time_point> started_;
  int n_workers_done_ = 0;
  std::string failed_;
};

}  // namespace
}  // namespace infemeral

int main(int argc, char** argv) {
  using namespace infemeral;
  const bool black_holes = argc < 2 || std::strcmp(argv[1], "--no-black-holes") != 0;
  if (!black_holes) {
    --argc;
    ++argv;
  }
  const int percent = argc > 2 ? std::atoi(argv[2]) : 100;
  const int workers = argc > 3 ? std::atoi(argv[3]) : 8;
  if (argc < 2 || argc > 4 || percent < 1 || workers < 1) {
    std::fprintf(stderr,
                 "usage: resume_soak [--no-black-holes] SERVER_COMMAND [BREAKS_IN_PERCENT "
                 "[WORKERS]]\n");
    return 2;
  }
  try {
    const Deployment deployment(argv[1], {.dtype = Dtype::kF32, .seed = std::random_device{}()});
    return Soak(deployment, percent, black_holes).run(workers);
  } catch (const std::exception& error) {
    std::printf("FAILED: %s\n", error.what());
    return 1;
  }
}
