// CPU and GPU side by side on a real model: the same tokens, and where they are not, how close the
// two candidates were.
//
//   backend_agreement PREPARED GOLDEN.json [TOKENS]
//
// PREPARED is a folder of engine_prep; GOLDEN.json holds the prompts' ids (tests/golden). Each
// backend generates for itself, through the encrypted channel, against a body in this process. At a
// first difference of a prompt both backends' logits are taken for the very row that each was
// given. One line a way of sampling on stdout, one more for every difference; exit code 1 if a
// greedy difference is no near-tie: larger than twice the largest distance between the two
// backends' logits there.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "engine/pipeline.h"
#include "engine/sampling.h"
#include "engine/text.h"
#include "perf/row_recorder.h"
#include "tools/backend_select.h"
#include "tools/endpoint.h"

namespace infemeral {
namespace {

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "backend_agreement: %s\n", what.c_str());
  std::exit(2);
}
template <typename T>
T value(absl::StatusOr<T> result) {
  if (!result.ok()) fail(std::string(result.status().message()));
  return *std::move(result);
}

// One backend with a body of its own.
struct Side {
  std::unique_ptr<ClientBackend> backend;
  std::optional<Endpoint> endpoint;
  std::unique_ptr<Link> link;

  Side(const std::filesystem::path& prepared, const std::string& name) {
    ClientFolder folder = value(ClientFolder::open(prepared / "client"));
    const ClientManifest manifest = folder.manifest;
    backend = value(open_backend(std::move(folder), {.name = name}, {}));
    endpoint = value(Endpoint::open({.body_folder = prepared / "body"}, manifest));
    link = value(endpoint->connect({}));
  }

  std::vector<std::int32_t> generate(const std::vector<std::int32_t>& prompt, std::uint32_t n,
                                     WireDtype wire, const SamplingParams& params) {
    Pipeline pipeline(*backend, *link, {.wire = wire});
    GenerateResult result;
    const absl::Status status =
        pipeline.generate({.prompt = prompt, .max_tokens = n, .sampling = params}, {}, {}, result);
    if (!status.ok()) fail(std::string(status.message()));
    return result.tokens;
  }

  std::vector<float> logits_after(const std::vector<std::int32_t>& history, WireDtype wire) {
    RowRecorder recorder(*link);
    Pipeline pipeline(*backend, recorder, {.wire = wire});
    GenerateResult result;
    absl::Status status = pipeline.generate({.prompt = history, .max_tokens = 1}, {}, {}, result);
    std::vector<float> logits(backend->vocab_size());
    if (status.ok()) status = backend->logits(recorder.rows().back(), wire, logits);
    if (!status.ok()) fail(std::string(status.message()));
    return logits;
  }
};

int run(int argc, char** argv) {
  if (argc < 3 || argc > 4) {
    std::fprintf(stderr, "usage: backend_agreement PREPARED GOLDEN.json [TOKENS]\n");
    return 2;
  }
  std::ifstream file(argv[2]);
  const auto golden = nlohmann::json::parse(file, nullptr, false);
  if (golden.is_discarded() || !golden.contains("prompts")) fail(cat(argv[2], " has no prompts"));
  const auto n = static_cast<std::uint32_t>(argc == 4 ? std::max(1, std::atoi(argv[3])) : 32);
  Side cpu(argv[1], "cpu"), cuda(argv[1], "cuda");

  struct Way {
    const char* name;
    WireDtype wire;
    SamplingParams params;
  };
  const Way ways[] = {
      {"greedy, wire f32", WireDtype::kF32, {}},
      {"greedy, wire f16", WireDtype::kF16, {}},
      {"greedy, wire i8", WireDtype::kI8, {}},
      {"T 1", WireDtype::kF16, {.temperature = 1, .seed = 21}},
      {"T 0.7, top-p 0.9", WireDtype::kF16, {.temperature = 0.7f, .top_p = 0.9f, .seed = 22}},
      {"T 0.7, top-k 50, top-p 0.9",
       WireDtype::kF16,
       {.temperature = 0.7f, .top_k = 50, .top_p = 0.9f, .seed = 23}},
      {"T 0.8, min-p 0.05", WireDtype::kF16, {.temperature = 0.8f, .min_p = 0.05f, .seed = 24}}};
  bool sound = true;
  for (const Way& way : ways) {
    std::size_t equal = 0, prompts = 0, tokens = 0;
    std::vector<std::string> lines;
    for (const auto& prompt : golden["prompts"]) {
      const std::vector<std::int32_t> ids = prompt["input_ids"];
      const auto a = cpu.generate(ids, n, way.wire, way.params),
                 b = cuda.generate(ids, n, way.wire, way.params);
      ++prompts;
      const auto at = static_cast<std::size_t>(
          std::mismatch(a.begin(), a.begin() + std::min(a.size(), b.size()), b.begin()).first -
          a.begin());
      tokens += at;
      if (at == a.size() && at == b.size()) {
        ++equal;
        continue;
      }
      if (at == std::min(a.size(), b.size())) fail("one backend ended before the other");
      std::vector<std::int32_t> history = ids;
      history.insert(history.end(), a.begin(), a.begin() + static_cast<std::ptrdiff_t>(at));
      const std::vector<float> x = cpu.logits_after(history, way.wire),
                               y = cuda.logits_after(history, way.wire);
      double distance = 0;
      for (std::size_t i = 0; i < x.size(); ++i) {
        distance = std::max(distance, static_cast<double>(std::fabs(x[i] - y[i])));
      }
      const auto gap = [&](const std::vector<float>& logits) {
        return static_cast<double>(logits[static_cast<std::size_t>(a[at])]) -
               logits[static_cast<std::size_t>(b[at])];
      };
      const double inverse = way.params.greedy() ? 1 : 1 / way.params.temperature;
      const auto noise = [&](std::int32_t id) {
        return way.params.greedy()
                   ? 0.0
                   : gumbel_noise(way.params.seed, history.size(), static_cast<std::uint32_t>(id));
      };
      const double drawn = inverse * gap(x) + noise(a[at]) - noise(b[at]);
      lines.push_back(cat("  near-tie: ", prompt["id"].get<std::string>(), " token ", at,
                          ": gap of the two logits ", gap(x), " (cpu) and ", gap(y),
                          " (cuda); of the scores with their noise ", drawn,
                          "; largest distance of any logit ", distance));
      if (way.params.greedy() && std::fabs(gap(x)) > 2 * distance) sound = false;
    }
    std::printf("%s: %zu of %zu prompts equal in all %u tokens; %zu tokens compared equal\n",
                way.name, equal, prompts, n, tokens);
    for (const std::string& line : lines) std::printf("%s\n", line.c_str());
    std::fflush(stdout);
  }
  return sound ? 0 : 1;
}

}  // namespace
}  // namespace infemeral

int main(int argc, char** argv) {
  return infemeral::run(argc, argv);
}
