// What the CUDA backend does when the device is too small, or fails; and the cloak that is made
// there. Without a GPU it says that it was skipped.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "engine/float16.h"
#include "engine/safetensors.h"
#include "engine/wire.h"
#include "kernels/client_backend.h"
#include "kernels/cloak.h"
#include "kernels/device.h"
#include "kernels/layout.h"
#include "tests/cuda_trap.h"
#include "tests/test_random.h"
#include "tests/tiny_model.h"
#include "tools/backend_select.h"

namespace infemeral {
namespace {

bool has_gpu() {
  const auto device = cuda::open_device();
  if (!device.ok()) {
    std::printf("skipped: no GPU (%s)\n", std::string(device.status().message()).c_str());
  }
  return device.ok();
}

// A tied client folder of random weights.
struct Client {
  TempFolder folder;
  std::size_t vocab, hidden;

  Client(std::size_t v, std::size_t h) : vocab(v), hidden(h) {
    std::filesystem::create_directories(folder.path());
    const CloakSeed seed = CloakSeed::random();
    REQUIRE(seed.save(folder.path() / "cloak.key").ok());
    REQUIRE(save_client_manifest({.model_type = "llama",
                                  .hidden_size = h,
                                  .vocab_size = v,
                                  .max_context = 64,
                                  .tied_embeddings = true,
                                  .cloak_mode = CloakMode::kLazy,
                                  .cloak_commitment = seed.commitment()},
                                 folder.path())
                .ok());
    auto writer = SafetensorsWriter::create(
        folder.path() / "client.safetensors",
        {{"final_norm.weight", Dtype::kF32, {h}}, {"embed_tokens.weight", Dtype::kF16, {v, h}}},
        {{"tied_embeddings", "true"}});
    REQUIRE(writer.ok());
    const std::vector<float> gain(h, 1.25f);
    REQUIRE((*writer)->write(std::as_bytes(std::span(gain))).ok());
    std::vector<std::uint16_t> table(4099), rows(h);
    for (auto& x : table) x = f32_to_f16(normal());
    for (std::size_t i = 0; i < v; ++i) {
      for (std::size_t j = 0; j < h; ++j) rows[j] = table[rng()() % table.size()];
      REQUIRE((*writer)->write(std::as_bytes(std::span(rows))).ok());
    }
    REQUIRE((*writer)->finish().ok());
  }
  absl::StatusOr<std::unique_ptr<ClientBackend>> open(CudaMemory memory,
                                                      std::vector<std::string>* log = nullptr) {
    return make_cuda_client_backend(ClientFolder::open(folder.path()).value(), {.memory = memory},
                                    [log](LogLevel, std::string_view line) {
                                      if (log != nullptr) log->emplace_back(line);
                                    });
  }
  std::vector<std::byte> random_row() const {
    const std::vector<float> values = normals(hidden);
    std::vector<std::byte> row(wire_row_bytes(WireDtype::kF16, hidden));
    encode_wire_row(WireDtype::kF16, values, row.data());
    return row;
  }
};

std::int32_t next_token(ClientBackend& backend, const std::vector<std::byte>& row,
                        const SamplingParams& params) {
  const SampleRequest request{.params = params, .position = 3};
  std::int32_t token = -1;
  PhaseTimes times;
  REQUIRE(backend.next_tokens(row, WireDtype::kF16, {&request, 1}, {&token, 1}, times).ok());
  return token;
}

// All of the device's free memory but `left` bytes.
class Hog {
 public:
  explicit Hog(std::size_t left) {
    std::size_t free = 0, total = 0;
    REQUIRE(cudaMemGetInfo(&free, &total) == cudaSuccess);
    for (std::size_t piece = std::size_t{1} << 34; piece >= (1 << 20); piece /= 2) {
      while (free > left + piece) {
        void* data = nullptr;
        if (cudaMalloc(&data, piece) != cudaSuccess) break;
        pieces_.push_back(data);
        REQUIRE(cudaMemGetInfo(&free, &total) == cudaSuccess);
      }
    }
    (void)cudaGetLastError();
  }
  ~Hog() {
    for (void* piece : pieces_) (void)cudaFree(piece);
  }

 private:
  std::vector<void*> pieces_;
};

}  // namespace

TEST_CASE("split memory gives the tokens of full memory, with less on the device") {
  if (!has_gpu()) return;
  Client client(5000, 320);
  auto full = client.open(CudaMemory::kFull), split = client.open(CudaMemory::kSplit);
  REQUIRE(full.ok());
  REQUIRE(split.ok());
  CHECK((*split)->memory().device_peak_bytes + client.vocab * client.hidden * 2 <=
        (*full)->memory().device_peak_bytes);
  CHECK((*split)->name().find("split") != std::string_view::npos);
  const SamplingParams ways[] = {{},
                                 {.temperature = 0.8f, .seed = 5},
                                 {.temperature = 0.7f, .top_k = 40, .top_p = 0.9f, .seed = 6},
                                 {.temperature = 0.7f, .top_p = 0.9f, .seed = 7}};
  for (int i = 0; i < 40; ++i) {
    const std::vector<std::byte> row = client.random_row();
    for (const SamplingParams& params : ways) {
      REQUIRE(next_token(**full, row, params) == next_token(**split, row, params));
    }
  }
}

TEST_CASE("a device without room for float16 rows gets the int8 ones, and says so in one line") {
  if (!has_gpu()) return;
  Client client(200000, 512);                        // 205 MB in float16, 102 MB in int8
  { REQUIRE(client.open(CudaMemory::kFull).ok()); }  // what the libraries keep is there from now on
  std::vector<std::string> log;
  {
    const Hog hog(320 << 20);
    auto backend = client.open(CudaMemory::kAuto, &log);
    REQUIRE(backend.ok());
    CHECK((*backend)->name().find("split") != std::string_view::npos);
    CHECK(log.size() == 1);
    next_token(**backend, client.random_row(), {});
  }
  log.clear();
  {
    const Hog hog(64 << 20);
    CHECK(client.open(CudaMemory::kAuto, &log).status().code() ==
          absl::StatusCode::kResourceExhausted);
  }
  REQUIRE(client.open(CudaMemory::kAuto, &log).ok());
}

TEST_CASE("the cloak that the device makes is the host's, but for float16 rounding") {
  if (!has_gpu()) return;
  auto device = cuda::open_device();
  REQUIRE(device.ok());
  for (std::size_t n : {65, 320, 1100}) {
    CAPTURE(n);
    const CloakSeed seed = CloakSeed::random();
    const Cloak host = Cloak::generate(seed, n).value();
    cuda::DeviceUsage usage;
    const std::size_t stride = cuda::padded(static_cast<int>(n));
    auto rows = cuda::Array<__half>::make(cuda::Place::kDevice, n * stride, usage).value();
    REQUIRE(cuda::generate_cloak(device->stage, seed, n, rows.data(), usage).ok());
    std::vector<std::uint16_t> made(n * stride);
    REQUIRE(cudaMemcpy(made.data(), rows.data(), rows.bytes(), cudaMemcpyDeviceToHost) ==
            cudaSuccess);
    std::size_t different = 0;
    for (std::size_t i = 0; i < n; ++i) {
      for (std::size_t j = 0; j < n; ++j) {
        const std::uint16_t a = made[i * stride + j], b = host.values()[i * n + j];
        if (a == b) continue;
        ++different;
        // Neighbours: one step apart, or around zero.
        const float gap = std::fabs(f16_to_f32(a) - f16_to_f32(b));
        REQUIRE(gap <= std::max(0x1p-24f, 0x1p-10f * std::fabs(f16_to_f32(b))));
      }
    }
    CHECK(different <= n * n / 1000);
  }
}

// The last one: it takes the device's context away from everybody in this process.
TEST_CASE(
    "an error of the device is final for its backend; a new one is opened, on the CPU if need be") {
  if (!has_gpu()) return;
  Client client(700, 96);
  const std::vector<std::byte> row = client.random_row();
  std::int32_t before = -1;
  {
    auto backend = client.open(CudaMemory::kFull);
    REQUIRE(backend.ok());
    before = next_token(**backend, row, {});
    break_device();
    const SampleRequest request;
    std::int32_t token = -1;
    PhaseTimes times;
    const absl::Status first =
        (*backend)->next_tokens(row, WireDtype::kF16, {&request, 1}, {&token, 1}, times);
    CHECK(first.code() == absl::StatusCode::kInternal);
    const std::vector<std::int32_t> ids = {1};
    std::vector<std::byte> out(wire_row_bytes(WireDtype::kF16, client.hidden));
    CHECK((*backend)->embed(ids, WireDtype::kF16, out, times) == first);
  }
  // By CUDA's rules some errors last as long as the process; then the GPU is not there for it.
  std::vector<std::string> log;
  auto again = open_backend(ClientFolder::open(client.folder.path()).value(), {.name = "auto"},
                            [&](LogLevel, std::string_view line) { log.emplace_back(line); });
  REQUIRE(again.ok());
  for (const std::string& line : log) std::printf("%s\n", line.c_str());
  CHECK(next_token(**again, row, {}) == before);
}

}  // namespace infemeral
