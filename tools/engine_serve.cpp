// engine_serve: the body server. Runs the rotated transformer layers for the clients on its list.
#include <sys/resource.h>

#include <CLI/CLI.hpp>
#include <atomic>
#include <cstdio>

#include "cpu/body.h"
#include "engine/text.h"
#include "net/body_server.h"
#include "net/identity.h"
#include "net/tls.h"
#include "tools/cli.h"
#include "tools/console.h"
#include "tools/heap.h"
#include "tools/metrics_endpoint.h"
#include "tools/signals.h"
#include "tools/worker_body.h"

namespace infemeral {
namespace {

// A GPU is worth as many rows as a step may have.
constexpr std::uint32_t kWorkerRows = 512;
// Of a worker's step the thread that waits for it only waits.
constexpr std::chrono::milliseconds kWorkerQuickRun{10};

struct ServeOptions {
  std::string model;
  int worker = -1;
  std::string listen = "127.0.0.1:50051";
  std::string identity;
  std::vector<std::string> allow;
  std::string metrics;
  TlsFiles tls;
  int threads = 0;
  std::uint32_t max_context = 0;
  std::uint32_t max_sessions = 64;
  std::uint32_t max_sessions_per_client = 0;
  std::uint64_t max_kv_mib = 0;
  bool quiet = false;
  bool verbose = false;
};

void add_flags(CLI::App& app, ServeOptions& o) {
  CLI::Option* model =
      with_env(app.add_option("--model", o.model, "Body folder that engine_prep wrote"));
  CLI::Option* worker = with_env(
      app.add_option("--worker", o.worker,
                     "Instead of --model: the descriptor of a socket to the process that runs the "
                     "layers and has started this one, as serve_torch --front does"));
  worker->check(CLI::NonNegativeNumber)->excludes(model);
  with_env(app.add_option("--listen", o.listen, "Address to listen on; port 0 takes a free one"))
      ->capture_default_str();
  with_env(
      app.add_option("--identity", o.identity, "This server's secret key file, from engine_keygen"))
      ->required();
  with_env(app.add_option("--allow", o.allow,
                          "A client's public key, or a file of them (one a line, read again on "
                          "SIGHUP); may be given several times"))
      ->required()
      ->allow_extra_args(false);
  with_env(app.add_option("--tls-cert", o.tls.cert,
                          "Speak TLS underneath the encrypted channel, with this certificate chain "
                          "(PEM)"));
  with_env(app.add_option("--tls-key", o.tls.key, "The certificate's private key (PEM)"));
  with_env(app.add_option("--tls-client-ca", o.tls.ca,
                          "Admit only clients with a TLS certificate of these CAs (PEM)"));
  with_env(app.add_option("--metrics", o.metrics,
                          "HOST:PORT for Prometheus to read counters from, at /metrics, such as "
                          "127.0.0.1:9464; anybody who reaches it can read them"));
  CLI::Option* threads = with_env(
      app.add_option("-t,--threads", o.threads, "Threads; 0 is one for each physical core"));
  threads->check(CLI::Range(0, 1024))->capture_default_str();
  CLI::Option* max_context = with_env(app.add_option(
      "--max-context", o.max_context, "Positions a session may hold; 0 is the model's own limit"));
  max_context->capture_default_str();
  worker->excludes(threads)->excludes(max_context);
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
  app.parse_complete_callback([model, worker] {
    if (model->empty() && worker->empty()) throw CLI::RequiredError("--model");
  });
}

absl::StatusOr<std::vector<PublicKey>> allowed_clients(const std::vector<std::string>& values) {
  std::vector<PublicKey> allowed;
  for (const std::string& value : values) {
    auto keys = read_public_keys(value);
    if (!keys.ok()) return keys.status();
    allowed.insert(allowed.end(), keys->begin(), keys->end());
  }
  return allowed;
}

// Every connection takes a descriptor, and the usual soft limit of 1,024 is there for programs that
// use select(). When it cannot be raised, the listener keeps to what there is.
void raise_descriptor_limit() {
  rlimit limit{};
  if (::getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
  limit.rlim_cur = limit.rlim_max;
  (void)::setrlimit(RLIMIT_NOFILE, &limit);
}

int serve(const ServeOptions& options, SignalStop& signals) {
  const Console console({.quiet = options.quiet, .verbose = options.verbose});
  raise_descriptor_limit();
  fix_heap_thresholds();
  const auto fail = [&](const absl::Status& status) {
    console.error(status);
    // What time may mend: an address that is not there yet, memory that others use.
    return absl::IsUnavailable(status) || absl::IsResourceExhausted(status) ? kExitServer
                                                                            : kExitUsage;
  };
  auto identity = Identity::load(options.identity);
  if (!identity.ok()) return fail(identity.status());
  auto allow = allowed_clients(options.allow);
  if (!allow.ok()) return fail(allow.status());
  std::optional<TlsPem> tls;
  if (!options.tls.empty()) {
    auto loaded = load_server_tls(options.tls);
    if (!loaded.ok()) return fail(loaded.status());
    tls = *std::move(loaded);
  }
  std::atomic<bool> worker_ended = false;
  const auto on_worker_end = [&](const absl::Status& status) {
    console.error(status);
    worker_ended = true;
    signals.request_stop();
  };
  const bool is_front = options.worker >= 0;
  if (is_front) signals.ignore_repeats();
  auto body =
      is_front
          ? open_worker_body(options.worker, {.max_rows = kWorkerRows, .on_end = on_worker_end})
          : load_cpu_body(options.model,
                          {.threads = options.threads, .max_context = options.max_context});
  if (!body.ok()) return fail(body.status());
  BodyServerOptions serving{.listen = options.listen,
                            .identity = &*identity,
                            .allow = *std::move(allow),
                            .max_sessions = options.max_sessions,
                            .max_sessions_per_client = options.max_sessions_per_client,
                            .max_kv_bytes = options.max_kv_mib << 20,
                            .tls = std::move(tls),
                            .log = console.sink()};
  if (is_front) {
    serving.joined_rows = kWorkerRows;
    serving.quick_run = kWorkerQuickRun;
  }
  auto server = BodyServer::start(**body, std::move(serving));
  if (!server.ok()) return fail(server.status());
  const HeapTrimmer trimmer(**server);
  std::unique_ptr<MetricsEndpoint> metrics;
  if (!options.metrics.empty()) {
    auto opened = MetricsEndpoint::open(options.metrics, **server);
    if (!opened.ok()) return fail(opened.status());
    metrics = *std::move(opened);
    log_to(console.sink(), LogLevel::kInfo,
           cat("metrics at http://", metrics->address(), "/metrics"));
  }

  // One line on stdout, so that a script can wait for it and learn the port.
  const std::string host = options.listen.substr(0, options.listen.rfind(':'));
  std::printf("listening on %s:%d, public key %s\n", host.c_str(), (*server)->port(),
              format_public_key(identity->public_key()).c_str());
  std::fflush(stdout);
  log_to(console.sink(), LogLevel::kInfo, cat("serving ", (*body)->info().description));

  signals.wait([&] {
    auto clients = allowed_clients(options.allow);
    const std::size_t n = clients.ok() ? clients->size() : 0;
    const absl::Status status =
        clients.ok() ? (*server)->set_allow(*std::move(clients)) : clients.status();
    if (status.ok()) {
      log_to(console.sink(), LogLevel::kInfo, cat("read the allow list again; clients: ", n));
    } else {
      console.error(absl::Status(
          status.code(), cat("the allow list stays as it was: ", std::string(status.message()))));
    }
  });
  log_to(console.sink(), LogLevel::kInfo, "shutting down");
  metrics.reset();
  (*server)->shutdown(std::chrono::seconds(10));
  return worker_ended ? kExitServer : kExitOk;
}

}  // namespace
}  // namespace infemeral

int main(int argc, char** argv) {
  using namespace infemeral;
  return run_program("engine_serve", [&]() -> int {
    SignalStop signals(/*hangup=*/true);
    ServeOptions options;
    CLI::App app(
        "Serves a model body to the clients on its list, over an encrypted channel.\n"
        "Every option can also be set by an environment variable: --listen is INFEMERAL_LISTEN.",
        "engine_serve");
    add_flags(app, options);
    if (auto code = parse_command_line(app, argc, argv)) return *code;
    return serve(options, signals);
  });
}
