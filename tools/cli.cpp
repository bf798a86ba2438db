#include "tools/cli.h"

#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <new>
#include <string_view>
#include <system_error>

#include "engine/json_file.h"
#include "engine/text.h"
#include "engine/version.h"

namespace infemeral {
namespace {

// Async-signal-safe; abort() then ends the process.
void say_aborted(int) {
  constexpr std::string_view kLine =
      "aborted: unless another reason stands above, gRPC got no memory or no thread from the "
      "system; see ulimit -v and ulimit -u\n";
  (void)!::write(STDERR_FILENO, kLine.data(), kLine.size());
}

}  // namespace

int server_exit_code(const absl::Status& status) {
  return absl::IsCancelled(status) ? kExitInterrupted : kExitServer;
}

int run_program(const char* name, const std::function<int()>& program) {
  std::signal(SIGABRT, say_aborted);
  // stdio without anything that would have to be allocated now.
  try {
    return program();
  } catch (const std::bad_alloc&) {
    std::fprintf(stderr,
                 "%s: out of memory; close other programs, or raise the limit (ulimit -v)\n", name);
  } catch (const std::system_error& error) {
    std::fprintf(stderr,
                 "%s: the system refuses a thread or memory: %s; see ulimit -u and ulimit -v\n",
                 name, error.code().message().c_str());
  }
  return kExitItemsFailed;
}

CLI::Option* with_env(CLI::Option* option) {
  std::string name = option->get_lnames().front();
  std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) {
    return c == '-' ? '_' : static_cast<char>(std::toupper(c));
  });
  return option->envname("INFEMERAL_" + name);
}

CLI::Validator whole_number() {
  return {[](std::string& text) -> std::string {
            const bool digits = !text.empty() && text.find_first_not_of("0123456789") == text.npos;
            return digits && (text.size() == 1 || text.front() != '0') ? "" : "not a whole number";
          },
          "NUMBER"};
}

void add_version(CLI::App& app) {
  app.set_version_flag("--version", cat(app.get_name(), " ", kVersion, " (", kGitRevision, ", ",
                                        kBuildType, ", ", kCompiler, ")"));
}

std::optional<int> parse_command_line(CLI::App& app, int argc, char** argv) {
  // gRPC's own lines on stderr say again, less clearly, what our errors say.
  ::setenv("GRPC_VERBOSITY", "NONE", /*overwrite=*/0);
  try {
    app.parse(argc, argv);
    return std::nullopt;
  } catch (const CLI::Success& success) {  // --help, --version
    return app.exit(success, std::cout, std::cerr);
  } catch (const CLI::ParseError& error) {
    std::cerr << app.get_name() << ": " << error.what() << " (" << app.get_name()
              << " --help lists the options)\n";
    return kExitUsage;
  }
}

absl::Status check_output_place(const std::string& file) {
  if (file.empty()) return absl::OkStatus();
  std::error_code ignored;
  if (std::filesystem::is_directory(file, ignored)) {
    return absl::InvalidArgumentError(cat(file, " is a folder; give the name of a file"));
  }
  const auto folder = std::filesystem::path(file).parent_path();
  if (::access(folder.empty() ? "." : folder.c_str(), W_OK) != 0) {
    return errno_status(errno, "cannot write", file);
  }
  return absl::OkStatus();
}

std::filesystem::path client_folder(const std::filesystem::path& dir) {
  std::error_code error;
  if (std::filesystem::exists(dir / "client" / "engine.json", error)) return dir / "client";
  return dir;
}

std::filesystem::path body_folder(const std::filesystem::path& client) {
  const auto absolute = std::filesystem::absolute(client).lexically_normal();
  return (absolute.has_filename() ? absolute.parent_path() : absolute.parent_path().parent_path()) /
         "body";
}

}  // namespace infemeral
