// engine_keygen: makes the identity of a client or of a body server.
<<<<<<< HEAD
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
=======
#include <fcntl.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <fstream>
#include <iostream>
#include <string>

#include "net/identity.h"

namespace {

constexpr int kFailed = 1;
constexpr int kUsage = 2;

int fail(const std::string& message) {
  std::cerr << "engine_keygen: " << message << "\n";
  return kFailed;
}

// The public half, in a new file beside the secret one.
bool write_public_file(const std::string& path, const std::string& line) {
  const int file = ::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
  if (file < 0) return false;
  const bool written = ::write(file, line.data(), line.size()) == static_cast<ssize_t>(line.size());
  return ::close(file) == 0 && written;
}

int generate(const std::string& path) {
  const std::string public_path = path + ".pub";
  if (::access(public_path.c_str(), F_OK) == 0) {
    return fail(public_path + " exists already; choose another name or move the old key away");
  }
  const infemeral::Identity identity = infemeral::Identity::generate();
  if (const absl::Status status = identity.save(path); !status.ok()) {
    return fail(std::string(status.message()));
  }
  const std::string text = infemeral::format_public_key(identity.public_key());
  if (!write_public_file(public_path, text + "\n")) {
    ::unlink(path.c_str());
    return fail("cannot write " + public_path);
  }
  std::cout << text << "\n";
  return 0;
}

int show_public(const std::string& path) {
  const absl::StatusOr<infemeral::Identity> identity = infemeral::Identity::load(path);
  if (!identity.ok()) return fail(std::string(identity.status().message()));
  std::cout << infemeral::format_public_key(identity->public_key()) << "\n";
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{
      "Makes a key pair for the encrypted channel and prints the public key. A client pins its\n"
      "server's public key; a server lists the public keys of its clients."};
  std::string output;
  std::string existing;
  auto* output_option = app.add_option(
      "-o,--output", output, "new secret key file (mode 0600); the public key goes to FILE.pub");
  auto* public_option =
      app.add_option("--public", existing, "print the public key of this secret key file");
  output_option->type_name("FILE");
  public_option->type_name("FILE")->excludes(output_option);
  app.require_option(1);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : kUsage;
  }
  return output.empty() ? show_public(existing) : generate(output);
>>>>>>> h/net
}
