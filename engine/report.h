// The JSON report of a run: what dashboards read. Versioned; numbers are finite; holds no prompt,
// text, token, key or path. The field names of the latencies are those of vLLM's serving benchmark;
// perf/report.schema.json is the format.
//
// engine_run's report is one run, its figures at the top level. engine_bench's has a list of runs,
// one for each backend, a list of cases, and a list of points where lines were tried out.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "engine/link.h"
#include "engine/metrics.h"
#include "engine/pipeline.h"

namespace infemeral {

// mean, median, standard deviation and percentiles of a set of samples; all 0 when it is empty.
struct Summary {
  std::size_t count = 0;
  double mean = 0, median = 0, std = 0, min = 0, p10 = 0, p50 = 0, p90 = 0, p95 = 0, p99 = 0,
         max = 0;
};
// Percentiles interpolate linearly between the closest ranks, as numpy.percentile does; std is the
// population's.
Summary summarize(std::span<const double> samples);

// Everything about a report that does not come from a measurement.
struct RunDescription {
  std::string tool;        // "engine_run"
  std::string model_type;  // "llama"
  std::size_t hidden_size = 0;
  std::size_t vocab_size = 0;
  bool tied_embeddings = false;
  std::string backend;  // ClientBackend::name(); engine_bench: of no single one, empty
  std::string body;     // SessionInfo::body
  std::string server;   // "local" or "remote"; never the address
  std::string head;     // "certified"
  std::string wire;     // "f16"
  std::string cipher;
  std::uint32_t max_tokens = 0;
  std::uint32_t max_draft = 0;
  int threads = 0;
  double load_ms = 0;                                          // start of the program to ready
  std::vector<std::pair<std::string, std::string>> libraries;  // name, version
  std::vector<std::pair<std::string, std::uint64_t>> bench_options;  // "runs", "prefill_tokens"
  double read_bytes_per_second = 0;  // of this machine's memory, measured; 0: not
};

// Bytes that a run held, beyond what the backend knows itself. 0 is unknown.
struct RunMemory {
  std::size_t embed_tokens_bytes = 0;  // as stored by the client
  std::size_t lm_head_bytes = 0;       // 0 when tied
  std::size_t body_weights_bytes = 0;  // of a local body
  std::size_t kv_bytes_per_token = 0;  // of a local body
};

// What a run's counters said at its end.
struct RunFigures {
  LinkCounters link;
  MemoryUse client;
  HeadCounters head;
  RunMemory memory;
  std::size_t peak_kv_positions = 0;  // Pipeline::peak_kv_positions()
  double wall_ms = 0;
};

class ReportBuilder {
 public:
  // A request that ended, well or (failed = true) badly; its tokens so far count.
  void add(const GenerateResult& result, std::size_t prompt_tokens, bool failed);

  // The whole report as JSON text. with_samples adds every request's own latencies and
  // the phases of every token, under "samples".
  std::string json(const RunDescription& run, const RunFigures& figures, bool with_samples) const;

  // Milliseconds from request to last token, over all requests: what the run took without the time
  // between requests.
  double busy_ms() const;

  // A table for people: where a token's time goes (mean over decode tokens, and the first token).
  std::string phase_table() const;

 private:
  friend struct ReportWriter;
  struct Request {
    GenerateResult result;  // timings and times only; the tokens are dropped
    std::size_t prompt_tokens = 0;
    std::size_t output_tokens = 0;
    bool failed = false;
  };
  std::vector<Request> requests_;
};

// One thing that was measured again and again.
struct CaseResult {
  struct Phase {
    std::string name;
    std::vector<double> ms;  // as many as the samples
  };
  std::string name;     // "decode"
  std::string backend;  // "cpu" or "cuda"; "none" where no backend takes part
  std::vector<double> samples_ms;
  std::vector<Phase> phases;
  std::string item;         // what a sample works on: "token", "row"
  std::uint64_t items = 1;  // of them in a sample
  std::string calibration;  // which loop was run between the samples: "compute", "handoff"
  std::vector<double> calibration_ms;
};

// The requests of one backend.
struct BenchRun {
  std::string backend;       // "cpu", "cuda"
  std::string backend_name;  // ClientBackend::name()
  double load_ms = 0;
  const ReportBuilder* requests = nullptr;  // not owned
  RunFigures figures;
};

// Requests of one prompt over a line of a known length and speed.
struct SweepPoint {
  std::string backend;
  double rtt_ms = 0;
  double bits_per_second = 0;  // each way; 0: not limited
  std::size_t prompt_tokens = 0;
  std::size_t output_tokens = 0;
  std::vector<double> ttft_ms, tpot_ms;  // one of each for a request
  // What the line alone takes for the hidden states that must cross it.
  double limit_ttft_ms = 0, limit_tpot_ms = 0;
};

// engine_bench's report. with_samples as above, and every case's samples too.
std::string bench_report_json(const RunDescription& description, std::span<const BenchRun> runs,
                              std::span<const CaseResult> cases, std::span<const SweepPoint> sweep,
                              bool with_samples);

}  // namespace infemeral
