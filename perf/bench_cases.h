// The named cases of engine_bench. Each runs its warm-ups and its measured repetitions, and keeps
// every sample with the phases that it consists of.
//
//   ttft     first token of each prompt, in a session that holds nothing yet
//   decode   each token after the first
//   prefill  first token of one long prompt
//   head     returned row to token, and token to cloaked row: the client's work without the body
//   codec    a long prompt's rows through the tensor codec, both ways
//   channel  a row to a body that only answers, and back: frames, encryption and gRPC
//   load     a prepared folder to a backend that is ready
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <stop_token>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/backend.h"
#include "engine/link.h"
#include "engine/pipeline.h"
#include "engine/report.h"
#include "perf/calibration.h"
#include "tools/backend_select.h"

namespace infemeral {

inline constexpr std::string_view kCaseNames[] = {"ttft",  "decode",  "prefill", "head",
                                                  "codec", "channel", "load"};

struct BenchPlan {
  std::vector<std::vector<std::int32_t>> prompts;
  std::vector<std::int32_t> long_prompt;
  std::uint32_t max_tokens = 64;  // of a prompt, in the decode case; at least 2
  WireDtype wire = WireDtype::kF16;
  std::size_t max_context = 0;  // as PipelineOptions
  int warmups = 1;              // repetitions that are not kept
  int runs = 5;                 // repetitions that are
  std::stop_token stop;
  std::function<void(std::string_view stage, double done, double total)> progress;
};

// Generates in a session of its own, so that nothing of the prompt is cached. InvalidArgument when
// the context does not hold max_tokens behind the prompt.
absl::Status generate_fresh(ClientBackend& backend, Link& link, const BenchPlan& plan,
                            const std::vector<std::int32_t>& prompt, std::uint32_t max_tokens,
                            GenerateResult& result);

// Rows that the body returns for the plan's prompts, the long one included, as `backend` goes on.
// Each prompt is generated twice, the second time from a session that still holds the first one's
// rows; Internal when the two do not give the same tokens.
absl::StatusOr<std::vector<std::vector<std::byte>>> record_rows(ClientBackend& backend, Link& link,
                                                                const BenchPlan& plan);

// What `backend` makes of returned rows must be what the full float16 head of `reference` makes of
// them: the chosen token is its best one (up to `tolerance` of the largest logit), and embedded
// rows differ by no more than the rounding of the wire. Internal, with what was found, when not.
absl::Status check_backend(ClientBackend& backend, ClientBackend& reference,
                           std::span<const std::vector<std::byte>> rows, const BenchPlan& plan,
                           double tolerance);

// `requests`, where given, gets every measured request.
absl::StatusOr<CaseResult> time_ttft(ClientBackend& backend, Link& link, const BenchPlan& plan,
                                     Calibrator& calibrator);
absl::StatusOr<CaseResult> time_decode(ClientBackend& backend, Link& link, const BenchPlan& plan,
                                       Calibrator& calibrator, ReportBuilder* requests);
absl::StatusOr<CaseResult> time_prefill(ClientBackend& backend, Link& link, const BenchPlan& plan,
                                        Calibrator& calibrator);
absl::StatusOr<CaseResult> time_head(ClientBackend& backend,
                                     std::span<const std::vector<std::byte>> rows,
                                     const BenchPlan& plan, Calibrator& calibrator);

// These check what they time as they go: Internal when a tensor or a row comes back changed.
absl::StatusOr<CaseResult> time_codec(std::size_t hidden_size, const BenchPlan& plan,
                                      Calibrator& calibrator);
absl::StatusOr<CaseResult> time_channel(std::size_t hidden_size, const BenchPlan& plan,
                                        Calibrator& calibrator);

// Opens what `folder` (a client folder) holds; with `body`, the body's checkpoint too.
absl::StatusOr<CaseResult> time_load(const std::filesystem::path& folder,
                                     const std::optional<std::filesystem::path>& body,
                                     const BackendOptions& options, const BenchPlan& plan,
                                     Calibrator& calibrator);

}  // namespace infemeral
