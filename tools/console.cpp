#include "tools/console.h"

#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>
#include <unistd.h>

#include <string>

namespace infemeral {
namespace {

spdlog::level::level_enum level_of(LogLevel level) {
  switch (level) {
    case LogLevel::kDebug:
      return spdlog::level::debug;
    case LogLevel::kInfo:
      return spdlog::level::info;
    case LogLevel::kWarning:
      return spdlog::level::warn;
    case LogLevel::kError:
      return spdlog::level::err;
  }
  return spdlog::level::err;
}

// A message may quote what came from outside: it must not move the cursor or break the line.
std::string one_line(std::string_view message) {
  std::string line(message);
  for (char& c : line) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = ' ';
  }
  return line;
}

}  // namespace

Console::Console(ConsoleOptions options) : options_(options) {
  auto logger = std::make_shared<spdlog::logger>(
      "infemeral", std::make_shared<spdlog::sinks::stderr_color_sink_mt>());
  logger->set_pattern("%^%l%$: %v");
  logger->set_level(options.quiet     ? spdlog::level::err
                    : options.verbose ? spdlog::level::debug
                                      : spdlog::level::info);
  logger->flush_on(spdlog::level::debug);
  spdlog::set_default_logger(std::move(logger));
}

LogSink Console::sink() const {
  return [](LogLevel level, std::string_view message) {
    spdlog::log(level_of(level), "{}", one_line(message));
  };
}

void Console::error(const absl::Status& status) const {
  spdlog::error("{}", one_line({status.message().data(), status.message().size()}));
}

int Console::fail(int exit_code, const absl::Status& status) const {
  error(status);
  return exit_code;
}

bool Console::progress_enabled() const {
  return !options_.quiet && ::isatty(STDERR_FILENO) != 0;
}

}  // namespace infemeral
