#include "tools/cli.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <iostream>

#include "engine/text.h"
#include "engine/version.h"

namespace infemeral {

CLI::Option* with_env(CLI::Option* option) {
  std::string name = option->get_lnames().front();
  std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) {
    return c == '-' ? '_' : static_cast<char>(std::toupper(c));
  });
  return option->envname("INFEMERAL_" + name);
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

std::filesystem::path client_folder(const std::filesystem::path& dir) {
  std::error_code error;
  if (std::filesystem::exists(dir / "client" / "engine.json", error)) return dir / "client";
  return dir;
}

}  // namespace infemeral
