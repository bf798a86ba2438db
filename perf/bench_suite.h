// All cases on all backends that there are, as one report: what engine_bench measures.
#pragma once

#include <cstdint>
#include <stop_token>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "tools/console.h"

namespace infemeral {

struct BenchOptions {
  std::string model;             // folder of engine_prep
  std::string server = "local";  // or "host:port", which needs the two keys
  std::string server_key;
  std::string identity;
  std::vector<std::string> cases;  // of kCaseNames; empty: all
  std::string backend = "auto";    // "cpu", "cuda", or "auto": each that is there
  std::string gpu_memory = "auto";
  int threads = 0;
  std::string head = "certified";
  std::string wire = "f16";
  std::uint32_t max_tokens = 64;
  std::uint32_t prefill_tokens = 256;
  int warmups = 1;
  int runs = 5;
  bool save_detailed = false;
  std::vector<std::string> sweep;  // as parse_sweep takes them; empty: none
};

// Checks, times, and gives the report as JSON text (perf/report.schema.json). Shows its progress on
// the console. Errors: those of the folder, the backends and the link; InvalidArgument for options
// that do not fit the model; Internal when a result is wrong, before anything of it was timed;
// Cancelled when `stop` was triggered.
absl::StatusOr<std::string> run_bench(const BenchOptions& options, const Console& console,
                                      std::stop_token stop);

}  // namespace infemeral
