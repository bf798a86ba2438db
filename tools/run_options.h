// engine_run's command line.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "engine/certified_head.h"
#include "engine/sampling.h"
#include "engine/wire.h"
#include "net/tls.h"
#include "tools/batch.h"

namespace infemeral {

struct RunOptions {
  std::string model;
  std::string server = "local";
  std::string server_key;
  std::string identity;
  TlsFiles tls;
  std::vector<std::string> prompts;
  std::string input_file;
  std::string output_file;
  std::string report_file;
  std::uint32_t max_tokens = 128;
  ItemOptions sampling;  // what the command line sets; the model's own defaults fill the rest
  bool ignore_end_tokens = false;
  bool chat = false;
  std::string backend = "auto";
  float cloak_noise = 0;
  std::string gpu_memory = "auto";
  int threads = 0;
  std::string head = "certified";
  HeadMode head_mode = HeadMode::kCertified;  // of that name: check_run_options()
  std::string wire = "f16";
  WireDtype wire_dtype = WireDtype::kF16;  // likewise
  bool pad = false;
  bool profile = false;
  bool stream = false;
  bool quiet = false;
  bool check = false;
  bool overwrite = false;
  bool resume = false;
  std::uint32_t parallel = 1;
  std::uint32_t max_draft = 0;
  std::uint32_t retry = 20;
  double retry_max_time = 300;  // seconds, as the next two
  double connect_timeout = 5;
  double step_timeout = 120;
};

// Flags for all of it; `options` outlives the parse.
void add_run_flags(CLI::App& app, RunOptions& options);

// What the flags' own checks leave: values out of range, and the names of head and wire, whose
// meaning it fills in.
// InvalidArgument names the flag.
absl::Status check_run_options(RunOptions& options);

// How an item is sampled: by its own options, else by the command line's, else as the model says.
SamplingParams sampling_for(const SamplingParams& model, const ItemOptions& command_line,
                            const ItemOptions& item);

}  // namespace infemeral
