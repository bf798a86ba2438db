// agreement PREPARED_DIR TEACHER_JSON: teacher-forced agreement of the private model with the
// reference, for every wire format. Prints a table; exits with 1 when a bar is missed.
//
// Position i of the teacher's text sees tokens 0..i. The argmax is compared with the reference's,
// and the KL divergence is taken over the buckets {top id 1, ..., top id K, everything else}.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>
#include <stop_token>
#include <vector>

#include "cpu/client_backend.h"
#include "tools/endpoint.h"

namespace infemeral {
namespace {

struct Teacher {
  std::vector<std::int32_t> token_ids;             // [N]
  std::vector<double> gaps;                        // [N] best logit minus second-best
  std::vector<std::vector<std::int32_t>> top_ids;  // [N][K], best first
  std::vector<std::vector<double>> top_logprobs;   // [N][K]
  std::vector<double> rest_logprobs;               // [N]
};

Teacher load_teacher(const char* path) {
  std::ifstream file(path);
  const auto json = nlohmann::json::parse(file);
  return {json["token_ids"], json["gaps"], json["top_ids"], json["top_logprobs"],
          json["rest_logprobs"]};
}

// KL(reference || ours) in nats.
double divergence(const Teacher& teacher, std::size_t position, const std::vector<float>& logits) {
  const double max = *std::max_element(logits.begin(), logits.end());
  double z = 0;
  for (float logit : logits) z += std::exp(logit - max);
  const auto& ids = teacher.top_ids[position];
  double reference_sum = std::exp(teacher.rest_logprobs[position]);
  for (double logprob : teacher.top_logprobs[position]) reference_sum += std::exp(logprob);
  double kl = 0, ours_rest = 1;
  for (std::size_t k = 0; k < ids.size(); ++k) {
    const double p = std::exp(teacher.top_logprobs[position][k]) / reference_sum;
    const double q = std::exp(logits[static_cast<std::size_t>(ids[k])] - max) / z;
    kl += p * std::log(p / q);
    ours_rest -= q;
  }
  const double p = std::exp(teacher.rest_logprobs[position]) / reference_sum;
  if (p > 0) kl += p * std::log(p / std::max(ours_rest, 1e-30));
  return kl;
}

struct Agreement {
  std::size_t positions = 0, agreed = 0, near_ties = 0;
  double kl = 0, share = 0;
};

absl::StatusOr<Agreement> measure(ClientBackend& backend, Link& link, WireDtype wire,
                                  const Teacher& teacher) {
  auto session = link.open_session({});
  if (!session.ok()) return session.status();
  const std::size_t row_bytes = wire_row_bytes(wire, backend.hidden_size());
  std::vector<float> logits(backend.vocab_size());
  Agreement result;
  const std::size_t n = teacher.token_ids.size();
  for (std::size_t begin = 0; begin < n;) {
    const std::size_t rows = std::min<std::size_t>(session->max_rows, n - begin);
    std::vector<std::byte> tensor(rows * row_bytes);
    PhaseTimes times;
    auto status = backend.embed({teacher.token_ids.data() + begin, rows}, wire, tensor, times);
    if (!status.ok()) return status;
    StepReply reply;
    status = link.step({.session = session->id,
                        .start_pos = static_cast<std::uint32_t>(begin),
                        .rows = static_cast<std::uint32_t>(rows),
                        .dtype = wire,
                        .tensor = tensor,
                        .wanted = Wanted::kAll},
                       {}, reply, times);
    if (!status.ok()) return status;
    for (std::size_t i = 0; i < rows; ++i) {
      status = backend.logits({reply.tensor.data() + i * row_bytes, row_bytes}, wire, logits);
      if (!status.ok()) return status;
      const auto argmax = std::max_element(logits.begin(), logits.end()) - logits.begin();
      const bool agreed = argmax == teacher.top_ids[begin + i][0];
      ++result.positions;
      result.agreed += agreed;
      result.near_ties += !agreed && teacher.gaps[begin + i] < 1e-3;
      result.kl += divergence(teacher, begin + i, logits);
    }
    begin += rows;
  }
  link.close_session(session->id);
  result.kl /= static_cast<double>(result.positions);
  result.share = static_cast<double>(result.agreed) / static_cast<double>(result.positions);
  return result;
}

int run(const char* prepared, const char* teacher_file) {
  const auto fail = [](const absl::Status& status) {
    std::fprintf(stderr, "agreement: %s\n", status.ToString().c_str());
    return 2;
  };
  const Teacher teacher = load_teacher(teacher_file);
  const std::filesystem::path out(prepared);
  auto folder = ClientFolder::open(out / "client");
  if (!folder.ok()) return fail(folder.status());
  const ClientManifest manifest = folder->manifest;
  auto backend = make_cpu_client_backend(*std::move(folder), {});
  if (!backend.ok()) return fail(backend.status());
  auto endpoint = Endpoint::open({.body_folder = out / "body"}, manifest);
  if (!endpoint.ok()) return fail(endpoint.status());
  auto link = endpoint->connect({});
  if (!link.ok()) return fail(link.status());

  std::printf("%-28s %-5s %10s %10s %12s %s\n", "body", "wire", "positions", "agreement", "mean KL",
              "near-ties among the differences");
  struct Bar {
    WireDtype wire;
    double share;
  };
  bool passed = true;
  const bool int8_body = endpoint->local_body()->info().description.ends_with(" i8");
  const double wide = int8_body ? 0.955 : 0.995, narrow = int8_body ? 0.95 : 0.97;
  for (const Bar& bar :
       {Bar{WireDtype::kF32, wide}, Bar{WireDtype::kF16, wide}, Bar{WireDtype::kI8, narrow}}) {
    auto result = measure(**backend, **link, bar.wire, teacher);
    if (!result.ok()) return fail(result.status());
    const bool reached = result->share >= bar.share;
    passed = passed && reached;
    std::printf("%-28s %-5s %10zu %9.2f%% %12.3e %zu of %zu%s\n",
                endpoint->local_body()->info().description.c_str(),
                std::string(wire_dtype_name(bar.wire)).c_str(), result->positions,
                100 * result->share, result->kl, result->near_ties,
                result->positions - result->agreed, reached ? "" : "  BELOW THE BAR");
  }
  return passed ? 0 : 1;
}

}  // namespace
}  // namespace infemeral

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: agreement PREPARED_DIR TEACHER_JSON\n");
    return 2;
  }
  return infemeral::run(argv[1], argv[2]);
}
