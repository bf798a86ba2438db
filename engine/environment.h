// The machine that a report was made on: what a reader needs to compare two of them. Nothing here
// names a user, a host or a path.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace infemeral {

struct Environment {
  std::string cpu;  // "AMD EPYC 9654", or "unknown"
  int logical_cores = 0;
  std::size_t memory_bytes = 0;   // of the machine; 0 when it does not say
  std::string os;                 // "Linux 6.1.0"
  std::string machine;            // "x86_64"
  std::vector<std::string> gpus;  // as the NVIDIA driver names them; empty without one
  std::string gpu_driver;         // "550.54.15", or empty
};

// Reads /proc; what is not there stays empty.
Environment read_environment();

// UTC, ISO 8601, to the second: "2026-01-31T12:00:00Z".
std::string utc_now();

}  // namespace infemeral
