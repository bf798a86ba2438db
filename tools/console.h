// What people read on stderr: log lines and errors. Results go to stdout and never through here.
#pragma once

#include "absl/status/status.h"
#include "engine/log.h"

namespace infemeral {

struct ConsoleOptions {
  bool quiet = false;    // errors only
  bool verbose = false;  // debug lines too
};

// Usable from any thread. Every message is one line.
class Console {
 public:
  explicit Console(ConsoleOptions options);

  // Must not outlive the console.
  LogSink sink() const;
  // "error: MESSAGE"
  void error(const absl::Status& status) const;
  // The same, for a program that ends with it: returns `exit_code`.
  int fail(int exit_code, const absl::Status& status) const;
  // Progress is shown to people, not to files: stderr is a terminal and not quiet.
  bool progress_enabled() const;

 private:
  ConsoleOptions options_;
};

}  // namespace infemeral
