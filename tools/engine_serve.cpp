// engine_serve: the body server. Runs the rotated transformer layers for the clients on its list.
#include <CLI/CLI.hpp>
#include <cstdio>

#include "cpu/body.h"
#include "engine/text.h"
#include "net/body_server.h"
#include "net/identity.h"
#include "tools/cli.h"
#include "tools/console.h"
#include "tools/signals.h"

namespace infemeral {
namespace {

struct ServeOptions {
  std::string model;
  std::string listen = "127.0.0.1:50051";
  std::string identity;
  std::vector<std::string> allow;
  int threads = 0;
  std::uint32_t max_context = 0;
  std::uint32_t max_sessions = 64;
  std::uint32_t max_sessions_per_client = 0;
  std::uint64_t max_kv_mib = 0;
  bool quiet = false;
  bool verbose = false;
};

void add_flags(CLI::App& app, ServeOptions& o) {
  with_env(app.add_option("--model", o.model, "Body folder that engine_prep wrote"))->required();
  with_env(app.add_option("--listen", o.listen, "Address to listen on; port 0 takes a free one"))
      ->capture_default_str();
  with_env(
      app.add_option("--identity", o.identity, "This server's secret key file, from engine_keygen"))
      ->required();
  with_env(app.add_option("--allow", o.allow,
                          "A client's public key, or a file of them (one a line); may be given "
                          "several times"))
      ->required();
  with_env(app.add_option("-t,--threads", o.threads, "Threads; 0 is one for each physical core"))
      ->check(CLI::Range(0, 1024))
      ->capture_default_str();
  with_env(app.add_option("--max-context", o.max_context,
                          "Positions a session may hold; 0 is the model's own limit"))
      ->capture_default_str();
  with_env(app.add_option("--max-sessions", o.max_sessions, "Sessions at a time"))
      ->check(CLI::Range(1u, 100000u))
      ->capture_default_str();
  with_env(app.add_option("--max-sessions-per-client", o.max_sessions_per_client,
                          "Of these, for one client; 0 is half of them, or all when only one "
                          "client is allowed"))
      ->check(CLI::Range(0u, 100000u))
      ->capture_default_str();
  with_env(app.add_option("--max-kv-mib", o.max_kv_mib,
                          "Memory for the KV caches of all sessions together, in MiB; 0 is no "
                          "limit"))
      ->check(CLI::Range(std::uint64_t{0}, std::uint64_t{1} << 40))
      ->capture_default_str();
  with_env(app.add_flag("--quiet", o.quiet, "Errors only"));
  with_env(app.add_flag("--verbose", o.verbose, "Connections and sessions too"));
  add_version(app);
}

absl::StatusOr<std::vector<PublicKey>> allowed_clients(const std::vector<std::string>& values) {
  std::vector<PublicKey> allowed;
  for (const std::string& value : values) {
    if (auto key = parse_public_key(value); key.ok()) {
      allowed.push_back(*key);
      continue;
    }
    auto keys = load_public_keys(value);
    if (!keys.ok()) return keys.status();
    allowed.insert(allowed.end(), keys->begin(), keys->end());
  }
  return allowed;
}

int serve(const ServeOptions& options, const SignalStop& signals) {
  const Console console({.quiet = options.quiet, .verbose = options.verbose});
  const auto fail = [&](const absl::Status& status) {
    console.error(status);
    return kExitUsage;
  };
  auto identity = Identity::load(options.identity);
  if (!identity.ok()) return fail(identity.status());
  auto allow = allowed_clients(options.allow);
  if (!allow.ok()) return fail(allow.status());
  auto body = load_cpu_body(options.model,
                            {.threads = options.threads, .max_context = options.max_context});
  if (!body.ok()) return fail(body.status());
  auto server =
      BodyServer::start(**body, {.listen = options.listen,
                                 .identity = &*identity,
                                 .allow = *std::move(allow),
                                 .max_sessions = options.max_sessions,
                                 .max_sessions_per_client = options.max_sessions_per_client,
                                 .max_kv_bytes = options.max_kv_mib << 20,
                                 .log = console.sink()});
  if (!server.ok()) return fail(server.status());

  // One line on stdout, so that a script can wait for it and learn the port.
  const std::string host = options.listen.substr(0, options.listen.rfind(':'));
  std::printf("listening on %s:%d, public key %s\n", host.c_str(), (*server)->port(),
              format_public_key(identity->public_key()).c_str());
  std::fflush(stdout);
  log_to(console.sink(), LogLevel::kInfo, cat("serving ", (*body)->info().description));

  signals.wait();
  log_to(console.sink(), LogLevel::kInfo, "shutting down");
  (*server)->shutdown(std::chrono::seconds(10));
  return kExitOk;
}

}  // namespace
}  // namespace infemeral

int main(int argc, char** argv) {
  using namespace infemeral;
  SignalStop signals;
  ServeOptions options;
  CLI::App app(
      "Serves a model body to the clients on its list, over an encrypted channel.\n"
      "Every option can also be set by an environment variable: --listen is INFEMERAL_LISTEN.",
      "engine_serve");
  add_flags(app, options);
  if (auto code = parse_command_line(app, argc, argv)) return *code;
  return serve(options, signals);
}
