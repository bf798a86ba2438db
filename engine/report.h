// The JSON report of a run: what dashboards read. Versioned; numbers are finite; holds no prompt,
// text, token, key or path. The field names of the latencies are those of vLLM's serving benchmark.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "engine/link.h"
#include "engine/metrics.h"
#include "engine/pipeline.h"

namespace infemeral {

// mean, median, standard deviation and percentiles of a set of samples; all 0 when it is empty.
struct Summary {
  std::size_t count = 0;
  double mean = 0, median = 0, std = 0, p50 = 0, p90 = 0, p95 = 0, p99 = 0, max = 0;
};
// Percentiles interpolate linearly between the closest ranks, as numpy.percentile does; std is the
// population's.
Summary summarize(std::span<const double> samples);

// Everything about one run that does not come from a single request.
struct RunDescription {
  std::string tool;        // "engine_run"
  std::string model_type;  // "llama"
  std::size_t hidden_size = 0;
  std::size_t vocab_size = 0;
  bool tied_embeddings = false;
  std::string backend;  // ClientBackend::name()
  std::string body;     // SessionInfo::body
  std::string server;   // "local" or "remote"; never the address
  std::string head;     // "certified"
  std::string wire;     // "f16"
  std::string cipher;
  std::uint32_t max_tokens = 0;
  int threads = 0;
  double load_ms = 0;  // start of the program to ready
};

class ReportBuilder {
 public:
  // A request that ended, well or (failed = true) badly; its tokens so far count.
  void add(const GenerateResult& result, std::size_t prompt_tokens, bool failed);

  // The whole report as JSON text. with_samples adds every request's own latencies and
  // the phases of every token, under "samples".
  std::string json(const RunDescription& run, const LinkCounters& link, const MemoryUse& client,
                   const HeadCounters& head, double wall_ms, bool with_samples) const;

  // A table for people: where a token's time goes (mean over decode tokens, and the first token).
  std::string phase_table() const;

 private:
  struct Request {
    GenerateResult result;  // timings and times only; the tokens are dropped
    std::size_t prompt_tokens = 0;
    std::size_t output_tokens = 0;
    bool failed = false;
  };
  std::vector<Request> requests_;
};

}  // namespace infemeral
