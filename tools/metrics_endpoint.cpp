#include "tools/metrics_endpoint.h"

#include <prometheus/collectable.h>
#include <prometheus/exposer.h>
#include <prometheus/metric_family.h>
#include <unistd.h>

#include <charconv>
#include <exception>
#include <fstream>
#include <limits>
#include <vector>

#include "engine/text.h"
#include "engine/version.h"

namespace infemeral {
namespace {

using prometheus::ClientMetric;
using prometheus::MetricFamily;
using prometheus::MetricType;

MetricFamily family(std::string name, std::string help, MetricType type) {
  return {.name = std::move(name), .help = std::move(help), .type = type, .metric = {{}}};
}

MetricFamily counter(std::string name, std::string help, std::uint64_t value) {
  MetricFamily result = family(std::move(name), std::move(help), MetricType::Counter);
  result.metric.front().counter.value = static_cast<double>(value);
  return result;
}

MetricFamily gauge(std::string name, std::string help, std::uint64_t value) {
  MetricFamily result = family(std::move(name), std::move(help), MetricType::Gauge);
  result.metric.front().gauge.value = static_cast<double>(value);
  return result;
}

MetricFamily build_info() {
  MetricFamily result = gauge("infemeral_build_info", "What is running; always 1.", 1);
  result.metric.front().label = {{"version", kVersion}, {"revision", kGitRevision}};
  return result;
}

std::uint64_t resident_bytes() {
  std::uint64_t size = 0, resident = 0;  // pages
  std::ifstream("/proc/self/statm") >> size >> resident;
  return resident * static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
}

MetricFamily latency(const StepLatency& steps) {
  MetricFamily result =
      family("infemeral_step_duration_seconds",
             "Time from a step's frame to its answer, waiting included.", MetricType::Histogram);
  ClientMetric::Histogram& histogram = result.metric.front().histogram;
  std::uint64_t sum = 0;
  for (std::size_t i = 0; i < steps.counts.size(); ++i) {
    sum += steps.counts[i];
    const double bound = i < kStepLatencyBounds.size() ? kStepLatencyBounds[i]
                                                       : std::numeric_limits<double>::infinity();
    histogram.bucket.push_back({.cumulative_count = sum, .upper_bound = bound});
  }
  histogram.sample_count = sum;
  histogram.sample_sum = steps.sum_seconds;
  return result;
}

class ServerMetrics final : public prometheus::Collectable {
 public:
  explicit ServerMetrics(const BodyServer& server) : server_(server) {}

  std::vector<MetricFamily> Collect() const override {
    const BodyServerCounters c = server_.counters();
    return {
        build_info(),
        counter("infemeral_connections_total", "Streams accepted.", c.connections),
        counter("infemeral_handshakes_total", "Streams of clients that proved their key.",
                c.handshakes),
        counter("infemeral_connections_refused_total", "Streams turned away before that.",
                c.refused),
        counter("infemeral_sessions_refused_total", "Sessions asked for and not given.",
                c.refused_sessions),
        counter("infemeral_steps_total", "Steps that the body ran.", c.steps),
        counter("infemeral_steps_failed_total", "Of these, steps without a result.",
                c.failed_steps),
        counter("infemeral_steps_refused_total", "Steps turned away before they ran.",
                c.refused_steps),
        latency(c.step_latency),
        gauge("infemeral_open_connections", "Streams that are open.", c.open_connections),
        gauge("infemeral_open_sessions", "Sessions that are open.", c.open_sessions),
        gauge("infemeral_waiting_steps", "Steps behind the run in progress.", c.waiting_steps),
        gauge("infemeral_kv_cache_bytes", "KV caches of the open sessions.", c.kv_bytes),
        // Prometheus's own name for it.
        gauge("process_resident_memory_bytes", "Resident memory, the mapped weights included.",
              resident_bytes()),
    };
  }

 private:
  const BodyServer& server_;
};

class HttpEndpoint final : public MetricsEndpoint {
 public:
  HttpEndpoint(const std::string& address, const BodyServer& server)
      : exposer_(address, /*num_threads=*/1), metrics_(std::make_shared<ServerMetrics>(server)) {
    address_ = cat(address.substr(0, address.rfind(':')), ":", exposer_.GetListeningPorts().at(0));
    exposer_.RegisterCollectable(metrics_);
  }
  const std::string& address() const override { return address_; }

 private:
  prometheus::Exposer exposer_;
  const std::shared_ptr<ServerMetrics> metrics_;  // the exposer holds it weakly
  std::string address_;
};

// The web server under the exposer takes more than addresses ("80r", "+8080", lists); this takes a
// host and a port.
bool is_address(std::string_view text) {
  const std::size_t colon = text.rfind(':');
  if (colon == std::string_view::npos || colon == 0) return false;
  const std::string_view host = text.substr(0, colon), digits = text.substr(colon + 1);
  std::uint16_t port = 0;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), port);
  const bool v6 = host.starts_with('[') && host.ends_with(']');
  return error == std::errc() && end == digits.data() + digits.size() &&
         host.find_first_of(", +") == std::string_view::npos &&
         (v6 || host.find(':') == std::string_view::npos);
}

}  // namespace

absl::StatusOr<std::unique_ptr<MetricsEndpoint>> MetricsEndpoint::open(const std::string& address,
                                                                       const BodyServer& server) {
  if (!is_address(address)) {
    return absl::InvalidArgumentError(
        cat("the metrics address ", quote_name(address), " is not of the form host:port"));
  }
  try {
    return std::make_unique<HttpEndpoint>(address, server);
  } catch (const std::exception&) {  // the web server gives no reason
    return absl::UnavailableError(
        cat("cannot listen on ", address,
            " for metrics; is the address one of this machine's, and the port free?"));
  }
}

}  // namespace infemeral
