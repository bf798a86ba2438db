// engine_keygen: makes the identity of a client or of a body server.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <string>

#include "engine/json_file.h"
#include "engine/text.h"
#include "net/identity.h"
#include "tools/cli.h"
#include "tools/console.h"

namespace infemeral {
namespace {

absl::Status print_public_key(const Identity& identity) {
  std::printf("%s\n", format_public_key(identity.public_key()).c_str());
  if (std::fflush(stdout) != 0) return absl::DataLossError("cannot write to stdout");
  return absl::OkStatus();
}

absl::Status generate(const std::string& path) {
  const std::string public_path = path + ".pub";
  if (::access(public_path.c_str(), F_OK) == 0) {
    return absl::AlreadyExistsError(
        cat(public_path, " exists already; choose another name or move the old key away"));
  }
  const Identity identity = Identity::generate();
  if (auto status = identity.save(path); !status.ok()) return status;
  const std::string line = format_public_key(identity.public_key()) + "\n";
  if (auto status = write_new_file(public_path, line, 0644); !status.ok()) {
    ::unlink(path.c_str());
    return status;
  }
  return print_public_key(identity);
}

absl::Status show_public(const std::string& path) {
  const auto identity = Identity::load(path);
  if (!identity.ok()) return identity.status();
  return print_public_key(*identity);
}

}  // namespace
}  // namespace infemeral

int main(int argc, char** argv) {
  using namespace infemeral;
  return run_program("engine_keygen", [&]() -> int {
    CLI::App app(
        "Makes a key pair for the encrypted channel and prints the public key. A client pins its\n"
        "server's public key; a server lists the public keys of its clients.",
        "engine_keygen");
    std::string output, existing;
    auto* output_option = app.add_option(
        "-o,--output", output, "New secret key file (mode 0600); the public key goes to FILE.pub");
    app.add_option("--public", existing, "Print the public key of this secret key file")
        ->excludes(output_option);
    app.require_option(1);
    add_version(app);
    if (auto code = parse_command_line(app, argc, argv)) return *code;
    const Console console({});
    const auto status = output.empty() ? show_public(existing) : generate(output);
    if (status.ok()) return kExitOk;
    console.error(status);
    return kExitUsage;
  });
}
