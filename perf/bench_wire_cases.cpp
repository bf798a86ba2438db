// The cases without a backend: codec and channel.
#include <algorithm>
#include <random>
#include <utility>

#include "engine/text.h"
#include "net/body_server.h"
#include "net/client_link.h"
#include "net/codec.h"
#include "perf/bench_bodies.h"
#include "perf/bench_cases.h"
#include "perf/case_recorder.h"

namespace infemeral {
namespace {

constexpr int kStepsPerRun = 200;

// Rows as they travel: cloaked states are close to Gaussian noise.
std::vector<std::byte> noise_rows(WireDtype dtype, std::size_t rows, std::size_t hidden) {
  std::mt19937_64 random(1);
  std::vector<std::byte> bytes;
  for (std::size_t i = 0; i < rows; ++i) {
    const std::vector<std::byte> row = random_row(dtype, hidden, random);
    bytes.insert(bytes.end(), row.begin(), row.end());
  }
  return bytes;
}

}  // namespace

absl::StatusOr<CaseResult> time_codec(std::size_t hidden_size, const BenchPlan& plan,
                                      Calibrator& calibrator) {
  const std::size_t rows = plan.long_prompt.size();
  CaseResult result = new_case("codec", "row", rows, CalibrationLoop::kCompute);
  const std::vector<std::byte> sent = noise_rows(plan.wire, rows, hidden_size);
  std::vector<std::byte> received;
  const auto status = repeat(plan, result.name, [&](bool measured) -> absl::Status {
    for (int i = 0; i < kStepsPerRun; ++i) {
      if (i % 16 == 0) {
        const double calibration_ms = calibrator.run(CalibrationLoop::kCompute);
        if (measured) result.calibration_ms.push_back(calibration_ms);
      }
      received.assign(sent.size(), std::byte{0xA5});
      PhaseTimes times;
      const auto begin = BenchClock::now();
      PhaseClock clock;
      const PackedTensor packed = pack_tensor(plan.wire, sent, rows);
      clock.lap(times.encode_ms);
      const auto unpacked = unpack_tensor(packed, sent.size(), received);
      clock.lap(times.decode_ms);
      const double ms = ms_since(begin);
      if (!unpacked.ok() || received != sent) {
        return absl::InternalError("the codec does not give back the rows that it was given");
      }
      if (measured) add_sample(result, ms, times);
    }
    return absl::OkStatus();
  });
  if (!status.ok()) return status;
  result = finished(std::move(result));
  return result;
}

absl::StatusOr<CaseResult> time_channel(std::size_t hidden_size, const BenchPlan& plan,
                                        Calibrator& calibrator) {
  EchoBody body(hidden_size);
  const Identity server_identity = Identity::generate(), client = Identity::generate();
  auto server =
      BodyServer::start(body, {.identity = &server_identity, .allow = {client.public_key()}});
  if (!server.ok()) return server.status();
  auto link = connect_link({.server = cat("127.0.0.1:", (*server)->port()),
                            .server_key = server_identity.public_key(),
                            .identity = &client,
                            .hidden_size = hidden_size});
  if (!link.ok()) return link.status();
  auto session = (*link)->open_session(plan.stop);
  if (!session.ok()) return session.status();

  CaseResult result = new_case("channel", "row", 1, CalibrationLoop::kHandoff);
  const std::vector<std::byte> sent = noise_rows(plan.wire, 1, hidden_size);
  StepReply reply;
  const auto status = repeat(plan, result.name, [&](bool measured) -> absl::Status {
    for (int i = 0; i < kStepsPerRun; ++i) {
      if (i % 8 == 0) {
        const double calibration_ms = calibrator.run(CalibrationLoop::kHandoff);
        if (measured) result.calibration_ms.push_back(calibration_ms);
      }
      PhaseTimes times;
      const auto begin = BenchClock::now();
      const auto stepped = (*link)->step({.session = session->id,
                                          .start_pos = 0,
                                          .rows = 1,
                                          .dtype = plan.wire,
                                          .tensor = sent,
                                          .wanted = Wanted::kLast},
                                         plan.stop, reply, times);
      const double ms = ms_since(begin);
      if (!stepped.ok()) return stepped;
      // An int8 row is quantized anew on its way back.
      if (plan.wire != WireDtype::kI8 && reply.tensor != sent) {
        return absl::InternalError("the channel does not give back the row that it was given");
      }
      if (measured) add_sample(result, ms, times);
    }
    return absl::OkStatus();
  });
  if (!status.ok()) return status;
  result = finished(std::move(result));
  return result;
}

}  // namespace infemeral
