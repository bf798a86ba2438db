// Where the library's words go: the program that embeds it decides. The library itself never
// prints.
#pragma once

#include <functional>
#include <string_view>

namespace infemeral {

enum class LogLevel { kDebug, kInfo, kWarning, kError };

// Called from any thread; may be empty (nothing is logged). Messages never hold keys, seeds,
// prompts or tokens.
using LogSink = std::function<void(LogLevel level, std::string_view message)>;

// Progress of long work: done of total units. Called from one thread, often; may be empty.
using ProgressSink = std::function<void(std::string_view stage, double done, double total)>;

inline void log_to(const LogSink& sink, LogLevel level, std::string_view message) {
  if (sink) sink(level, message);
}

}  // namespace infemeral
