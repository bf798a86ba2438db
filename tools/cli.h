// What the command line programs share: exit codes, --version, and flags from the environment.
#pragma once

#include <CLI/CLI.hpp>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>

#include "absl/status/status.h"

namespace infemeral {

inline constexpr int kExitOk = 0;
inline constexpr int kExitItemsFailed = 1;  // some items failed, the others are done
inline constexpr int kExitUsage = 2;        // bad usage or input
inline constexpr int kExitServer = 3;       // server unreachable, refused, or gone
inline constexpr int kExitInterrupted = 130;

// kExitInterrupted where a link's error is Cancelled, else kExitServer.
int server_exit_code(const absl::Status& status);

// Runs a whole program. Memory or a thread that the system refuses at start, before there is an
// object that could report it, ends the program with one line and kExitItemsFailed.
int run_program(const char* name, const std::function<int()>& program);

// Lets --long-name be set by INFEMERAL_LONG_NAME too; the command line wins.
CLI::Option* with_env(CLI::Option* option);

// Digits alone. The parser itself takes -1 for the largest number of an unsigned type, and 010 for
// 8.
CLI::Validator whole_number();

// --version: what was built, on stdout.
void add_version(CLI::App& app);

// An exit code when the program should end now: after --help or --version, or on bad usage (one
// line on stderr that names the flag).
std::optional<int> parse_command_line(CLI::App& app, int argc, char** argv);

// Whether `file`, where it is not empty, has a folder that can be written to: asked before the work
// whose result it is to hold.
absl::Status check_output_place(const std::string& file);

// The client folder that a user means by `dir`: OUT, as engine_prep wrote it, or OUT/client itself.
std::filesystem::path client_folder(const std::filesystem::path& dir);

// The body folder that engine_prep wrote beside a client folder.
std::filesystem::path body_folder(const std::filesystem::path& client);

}  // namespace infemeral
