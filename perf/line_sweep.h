// Time to the first token and time per output token over lines of several lengths and speeds: the
// whole private stack, its connection going through the project's own relay (tests/line.h).
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/backend.h"
#include "engine/link.h"
#include "engine/report.h"
#include "perf/bench_cases.h"

namespace infemeral {

// Every round trip time with every bandwidth.
struct SweepAxes {
  std::vector<double> rtt_ms;
  std::vector<double> bits_per_second;  // each way; 0: as fast as the relay goes
};

// "rtt=0,10,20" in milliseconds up to 1000 and "bandwidth=100M,1G" in bits a second, with k, M or
// G, from 100k to 100G; each at most once. The axis that is not named has one place: 0. Empty axes
// for no words. InvalidArgument, with what is wrong, for anything else.
absl::StatusOr<SweepAxes> parse_sweep(std::span<const std::string> words);

// What the sweep goes through.
struct SweepRoute {
  Link* direct = nullptr;  // without the relay: the tokens that must come
  int server_port = 0;     // on this machine
  // A link to the server whose bytes go to this port of this machine.
  std::function<absl::StatusOr<std::unique_ptr<Link>>(int port)> connect;
};

// The plan's long prompt and a few tokens after it, in a session that holds nothing, warm-ups and
// runs as the plan says. Tokens that are not those of the direct link are Internal. The points'
// `backend` is left to the caller.
absl::StatusOr<std::vector<SweepPoint>> time_sweep(ClientBackend& backend, const SweepRoute& route,
                                                   const SweepAxes& axes, const BenchPlan& plan);

}  // namespace infemeral
