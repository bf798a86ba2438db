// What a decode token costs in calls to the CUDA runtime: one graph launch. The linker puts the
// functions below in front of the runtime's (tests/Cuda.cmake), for calls from this repository.
#define CATCH_CONFIG_ENABLE_PAIR_STRINGMAKER
#include <cuda_runtime_api.h>

#include <catch2/catch.hpp>
#include <iostream>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "kernels/client_backend.h"
#include "kernels/mailbox.h"
#include "tests/client_fixture.h"
#include "tests/head_problems.h"
#include "tests/test_random.h"

namespace infemeral {
namespace {

using Calls = std::map<std::string, int>;  // by function; those that were called

// Weights are copied to the device by several threads.
class Recorder {
 public:
  void add(const char* function) {
    const std::lock_guard lock(mutex_);
    ++calls_[function];
  }
  // Since the last time.
  Calls take() {
    const std::lock_guard lock(mutex_);
    return std::exchange(calls_, {});
  }

 private:
  std::mutex mutex_;
  Calls calls_;
};
Recorder& recorder() {
  static Recorder one;
  return one;
}

}  // namespace
}  // namespace infemeral

// NOLINTBEGIN(bugprone-reserved-identifier): the linker's names.
#define COUNTED(function, parameters, arguments) \
  cudaError_t __real_##function parameters;      \
  cudaError_t __wrap_##function parameters {     \
    infemeral::recorder().add(#function);        \
    return __real_##function arguments;          \
  }

extern "C" {
COUNTED(cudaMalloc, (void** p, size_t n), (p, n))
COUNTED(cudaMallocAsync, (void** p, size_t n, cudaStream_t s), (p, n, s))
COUNTED(cudaMallocHost, (void** p, size_t n), (p, n))
COUNTED(cudaHostAlloc, (void** p, size_t n, unsigned flags), (p, n, flags))
COUNTED(cudaFree, (void* p), (p))
COUNTED(cudaFreeHost, (void* p), (p))
COUNTED(cudaMemcpy, (void* to, const void* from, size_t n, cudaMemcpyKind kind),
        (to, from, n, kind))
COUNTED(cudaMemcpyAsync,
        (void* to, const void* from, size_t n, cudaMemcpyKind kind, cudaStream_t s),
        (to, from, n, kind, s))
COUNTED(cudaMemcpy2DAsync,
        (void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
         size_t height, cudaMemcpyKind kind, cudaStream_t s),
        (to, to_pitch, from, from_pitch, width, height, kind, s))
COUNTED(cudaMemset, (void* p, int value, size_t n), (p, value, n))
COUNTED(cudaMemsetAsync, (void* p, int value, size_t n, cudaStream_t s), (p, value, n, s))
COUNTED(cudaStreamSynchronize, (cudaStream_t s), (s))
COUNTED(cudaDeviceSynchronize, (), ())
COUNTED(cudaEventSynchronize, (cudaEvent_t e), (e))
COUNTED(cudaGraphInstantiate, (cudaGraphExec_t * e, cudaGraph_t g, unsigned long long flags),
        (e, g, flags))
COUNTED(cudaGraphLaunch, (cudaGraphExec_t e, cudaStream_t s), (e, s))
COUNTED(cudaLaunchKernel,
        (const void* f, dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t s),
        (f, grid, block, args, shared, s))
COUNTED(cudaLaunchKernelExC, (const cudaLaunchConfig_t* config, const void* f, void** args),
        (config, f, args))
}
// NOLINTEND(bugprone-reserved-identifier)

namespace infemeral {
namespace {

std::unique_ptr<ClientBackend> load(const Client& client, HeadMode head) {
  auto backend = make_cuda_client_backend(client.open(), {.head = head}, {});
  if (backend.status().code() == absl::StatusCode::kUnavailable) {
    static bool said = false;
    if (!std::exchange(said, true)) {
      std::cout << "skipped: no GPU (" << backend.status().message() << ")\n";
    }
    return nullptr;
  }
  INFO(backend.status().message());
  REQUIRE(backend.ok());
  return *std::move(backend);
}

// A peaked state: greedy rows and small top-k are certified.
std::vector<std::byte> returned_row(const Client& client, WireDtype dtype) {
  return encode(dtype, random_row(client.hidden));
}

struct Step {
  std::int32_t token = -1;
  Calls calls;  // of next_tokens and the embedding of its token
  std::vector<std::byte> next_row;
};

Step decode_token(ClientBackend& backend, std::span<const std::byte> row, WireDtype dtype,
                  const SampleRequest& request) {
  Step step;
  step.next_row.resize(wire_row_bytes(dtype, backend.hidden_size()), std::byte{0xa5});
  PhaseTimes times;
  (void)recorder().take();
  const absl::Status chosen =
      backend.next_tokens(row, dtype, {&request, 1}, {&step.token, 1}, times);
  const absl::Status embedded = backend.embed({&step.token, 1}, dtype, step.next_row, times);
  step.calls = recorder().take();
  INFO(chosen.message() << embedded.message());
  REQUIRE((chosen.ok() && embedded.ok()));
  return step;
}

}  // namespace

TEST_CASE("a warm decode token is one graph launch, and its row is there already") {
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  const Client client({.hidden = 128, .vocab = 3000});
  const Calls one_launch = {{"cudaGraphLaunch", 1}};
  std::vector<float> logits(client.vocab);
  int n_at_once = 0, steps = 0;
  for (HeadMode head : {HeadMode::kCertified, HeadMode::kFull}) {
    (void)recorder().take();
    const auto backend = load(client, head);
    if (backend == nullptr) return;
    // That calls are counted at all.
    Calls loading = recorder().take();
    CHECK(loading["cudaMalloc"] > 10);
    CHECK(loading["cudaHostAlloc"] > 3);
    CHECK(loading["cudaStreamSynchronize"] > 0);
    for (WireDtype dtype : kAllWires) {
      for (const SamplingParams& params : kSamplingKinds) {
        const std::vector<std::int32_t> history = random_history(client.vocab);
        CAPTURE(head_mode_name(head).data(), wire_dtype_name(dtype).data(), params.temperature,
                params.top_k, params.top_p, params.min_p, params.repetition_penalty);
        SampleRequest request{.params = params, .history = history};
        // Warms up: the graphs of this step, and that of a row which is not prepared.
        (void)decode_token(*backend, returned_row(client, dtype), dtype, request);
        std::vector<std::byte> row(wire_row_bytes(dtype, client.hidden));
        PhaseTimes unused;
        const std::vector<std::int32_t> id = {0};
        for (int i = 0; i < 2; ++i) {
          REQUIRE(backend->embed(id, dtype, row, unused).ok());
          REQUIRE(backend->logits(returned_row(client, dtype), dtype, logits).ok());
        }
        for (int i = 0; i < 5; ++i, ++steps) {
          request.params.seed = rng()();
          ++request.position;
          const std::uint64_t full_passes = backend->head_counters().full_passes;
          const Step step = decode_token(*backend, returned_row(client, dtype), dtype, request);
          // Without a proof the full head follows, kernel by kernel, and its token's row is another
          // graph. Where the scores' order leaves open what the filter keeps, a block looks at all.
          const auto selection =
              cuda::row_request(request, static_cast<int>(client.vocab), 1).selection;
          const int kernels =
              3 + cuda::needs_scan(selection) + (selection != cuda::Selection::kGreedy);
          const Calls without = {
              {"cudaGraphLaunch", 2}, {"cudaMemsetAsync", 1}, {"cudaLaunchKernelExC", kernels}};
          const Calls open = {
              {"cudaGraphLaunch", 2}, {"cudaMemsetAsync", 1}, {"cudaLaunchKernelExC", kernels + 1}};
          const Calls open_full = {{"cudaGraphLaunch", 2}, {"cudaLaunchKernelExC", 1}};
          CAPTURE(step.calls);
          const bool filters =
              selection == cuda::Selection::kNucleus || selection == cuda::Selection::kTopK;
          const bool at_once = step.calls == one_launch;
          if (head == HeadMode::kFull) {
            CHECK((at_once || (filters && step.calls == open_full)));
          } else {
            CHECK(at_once == (backend->head_counters().full_passes == full_passes));
            CHECK((at_once || step.calls == without || (filters && step.calls == open)));
          }
          n_at_once += at_once;

          std::vector<std::byte> again(step.next_row.size());
          PhaseTimes times;
          (void)recorder().take();
          const absl::Status status = backend->embed({&step.token, 1}, dtype, again, times);
          const Calls second = recorder().take();
          REQUIRE(status.ok());
          CHECK(second == (at_once ? Calls{} : one_launch));
          CHECK(again == step.next_row);
        }
      }
    }
  }
  CHECK(n_at_once > steps * 3 / 4);
}

TEST_CASE("a warm step of many rows is one graph launch, too, and warm prompts allocate nothing") {
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  const Client client({.hidden = 128, .vocab = 3000});
  const auto backend = load(client, HeadMode::kCertified);
  if (backend == nullptr) return;
  PhaseTimes times;
  for (std::size_t n : {2, 8, 32}) {
    std::vector<std::byte> rows;
    std::vector<std::int32_t> tokens(n);
    for (int i = 0; i < 3; ++i) {
      rows.clear();
      for (std::size_t row = 0; row < n; ++row) {
        const auto bytes = returned_row(client, WireDtype::kF16);
        rows.insert(rows.end(), bytes.begin(), bytes.end());
      }
      (void)recorder().take();
      const absl::Status status =
          backend->next_tokens(rows, WireDtype::kF16, std::vector<SampleRequest>(n), tokens, times);
      const Calls made = recorder().take();
      REQUIRE(status.ok());
      CAPTURE(n, i);
      if (i > 0) CHECK(made == Calls{{"cudaGraphLaunch", 1}});
    }
  }
  for (std::size_t n : {2, 32, 33, 300}) {
    const std::vector<std::int32_t> ids(n, 7);
    std::vector<std::byte> out(n * wire_row_bytes(WireDtype::kF16, client.hidden));
    for (int i = 0; i < 2; ++i) {
      (void)recorder().take();
      REQUIRE(backend->embed(ids, WireDtype::kF16, out, times).ok());
      Calls made = recorder().take();
      CAPTURE(n, i);
      if (i > 0) CHECK(made["cudaMalloc"] + made["cudaHostAlloc"] == 0);
    }
  }
}

}  // namespace infemeral
