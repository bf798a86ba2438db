#include "tools/heap.h"

#include <malloc.h>

#include <chrono>
#include <condition_variable>
#include <mutex>

namespace infemeral {
namespace {

// What glibc starts with.
constexpr int kThreshold = 128 * 1024;

// Two looks that find the same are rest: nobody decodes who is about to come back. A trim takes
// 0.4 ms and locks one arena after the other, so a step that comes meanwhile may wait for a part of
// that. One that runs for longer than this does not: it computes in buffers that it has.
constexpr std::chrono::milliseconds kLook{100};

// What has come and gone. Without a change here a trim would find little: the large blocks of steps
// are mappings, the small ones serve the next step.
struct Conversations {
  std::uint64_t streams = 0;
  std::uint32_t connections = 0;
  std::uint32_t sessions = 0;
  bool operator==(const Conversations&) const = default;
};

struct Look {
  Conversations conversations;
  std::uint64_t steps = 0;
  bool operator==(const Look&) const = default;
};

void trim_at_rest(const BodyServer& server, const std::stop_token& stop) {
  std::mutex mutex;
  std::condition_variable_any stopped;
  std::unique_lock lock(mutex);
  Look last;
  Conversations trimmed;
  while (!stopped.wait_for(lock, stop, kLook, [&] { return stop.stop_requested(); })) {
    const BodyServerCounters c = server.counters();
    const Look look{.conversations = {c.connections, c.open_connections, c.open_sessions},
                    .steps = c.steps};
    const bool rests = look == last && c.waiting_steps == 0;
    last = look;
    if (!rests || look.conversations == trimmed) continue;
    trimmed = look.conversations;
    ::malloc_trim(0);
  }
}

}  // namespace

// By default glibc raises both thresholds with every larger mapping that is freed, up to 32 MiB:
// after the first long prompts, or the first large buffer, the blocks of all later ones come from
// its arenas, one for each few of gRPC's threads. There they stay when they are freed, below
// whatever small block is still in use. To set a threshold ends that rule. The price is new pages
// for every large block: at most 1.4 ms of the system's time for each MB of a prompt's rows
// (perf/prefill_line), for which a body on the CPU computes for hundreds. A decode step has none.
void fix_heap_thresholds() {
  ::mallopt(M_MMAP_THRESHOLD, kThreshold);
  ::mallopt(M_TRIM_THRESHOLD, kThreshold);
}

HeapTrimmer::HeapTrimmer(const BodyServer& server)
    : thread_([&server](const std::stop_token& stop) { trim_at_rest(server, stop); }) {}

}  // namespace infemeral
