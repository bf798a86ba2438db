// The hot functions of the CPU, one call after the other on fixed inputs and one thread, for
// counting their instructions under callgrind: counts do not depend on what else the machine does.
// perf/instruction_gate.py runs it.
//
//   hot_functions prepare DIR   makes a small prepared model
//   hot_functions run DIR       calls every hot_* function below
#include <array>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>
#include <random>
#include <vector>

#include "cpu/body.h"
#include "cpu/client_backend.h"
#include "cpu/prepare.h"
#include "net/codec.h"
#include "tests/tiny_model.h"

namespace infemeral {
namespace {

constexpr std::size_t kHidden = 256, kVocab = 8192;
constexpr std::uint32_t kPrefillRows = 48;
constexpr int kCalls = 4;  // a first call may set something up; it weighs a quarter

[[noreturn]] void fail(const absl::Status& status) {
  std::fprintf(stderr, "hot_functions: %s\n", std::string(status.message()).c_str());
  std::exit(1);
}
void check(const absl::Status& status) {
  if (!status.ok()) fail(status);
}

std::vector<float> random_floats(std::size_t n) {
  std::minstd_rand rng(1);
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::vector<float> x(n);
  for (float& v : x) v = uniform(rng);
  return x;
}

void prepare(const std::filesystem::path& folder) {
  make_tiny_model(folder / "model", {.hidden = kHidden,
                                     .layers = 2,
                                     .heads = 4,
                                     .kv_heads = 2,
                                     .head_dim = 64,
                                     .intermediate = 512,
                                     .vocab = kVocab,
                                     .tied = true,
                                     .dtype = Dtype::kF16});
  std::array<std::uint8_t, 32> bytes;
  bytes.fill(7);
  const CloakSeed seed = CloakSeed::from_bytes(bytes);
  const auto prepared = prepare_model({.model_dir = folder / "model",
                                       .output_dir = folder / "out",
                                       .body_dtype = Dtype::kF16,
                                       .seed = &seed});
  check(prepared.status());
}

}  // namespace

// Names that callgrind finds again: not inlined, not renamed. One for each phase of a token that
// computes, and the same names as in a report where there is one.
extern "C" {

[[gnu::noinline]] void hot_embed_cloak(ClientBackend& backend, std::span<std::byte> row) {
  const std::int32_t token = 17;
  PhaseTimes times;
  check(backend.embed({&token, 1}, WireDtype::kF16, row, times));
}

[[gnu::noinline]] void hot_head_greedy(ClientBackend& backend, std::span<const std::byte> row) {
  const SampleRequest request{};
  std::int32_t token = -1;
  PhaseTimes times;
  check(backend.next_tokens(row, WireDtype::kF16, {&request, 1}, {&token, 1}, times));
}

[[gnu::noinline]] void hot_head_top_p(ClientBackend& backend, std::span<const std::byte> row) {
  const SampleRequest request{
      .params = {.temperature = 0.7f, .top_k = 50, .top_p = 0.9f, .seed = 5}, .position = 3};
  std::int32_t token = -1;
  PhaseTimes times;
  check(backend.next_tokens(row, WireDtype::kF16, {&request, 1}, {&token, 1}, times));
}

[[gnu::noinline]] void hot_body_prefill(Body& body, BodyStep& step) {
  body.run({&step, 1});
  check(step.status);
}

[[gnu::noinline]] void hot_body_decode(Body& body, BodyStep& step) {
  body.run({&step, 1});
  check(step.status);
}

[[gnu::noinline]] void hot_codec(std::span<const std::byte> rows, std::vector<std::byte>& out) {
  check(unpack_tensor(pack_tensor(WireDtype::kF16, rows, kPrefillRows), rows.size(), out));
}

}  // extern "C"

namespace {

void run(const std::filesystem::path& folder) {
  auto body = load_cpu_body(folder / "out" / "body", {.threads = 1});
  check(body.status());
  auto session = (*body)->new_session();
  check(session.status());
  const std::vector<float> states = random_floats(kPrefillRows * kHidden);
  std::vector<float> out(kHidden);
  BodyStep prefill{.session = session->get(), .rows = kPrefillRows, .states = states, .out = out};
  BodyStep decode{.session = session->get(),
                  .start_pos = kPrefillRows,
                  .rows = 1,
                  .states = std::span(states).first(kHidden),
                  .out = out};
  for (int i = 0; i < kCalls; ++i) hot_body_prefill(**body, prefill);
  for (int i = 0; i < kCalls; ++i) hot_body_decode(**body, decode);

  auto client = ClientFolder::open(folder / "out" / "client");
  check(client.status());
  auto backend = make_cpu_client_backend(*std::move(client), {.threads = 1});
  check(backend.status());
  std::vector<std::byte> row(wire_row_bytes(WireDtype::kF16, kHidden));
  const std::int32_t token = 0;  // makes the cloak, which is no part of a token
  PhaseTimes times;
  check((*backend)->embed({&token, 1}, WireDtype::kF16, row, times));
  for (int i = 0; i < kCalls; ++i) hot_embed_cloak(**backend, row);
  encode_wire_row(WireDtype::kF16, out, row.data());
  for (int i = 0; i < kCalls; ++i) hot_head_greedy(**backend, row);
  for (int i = 0; i < kCalls; ++i) hot_head_top_p(**backend, row);

  std::vector<std::byte> rows(kPrefillRows * row.size()), received;
  for (std::uint32_t i = 0; i < kPrefillRows; ++i) {
    encode_wire_row(WireDtype::kF16, std::span(states).subspan(i * kHidden, kHidden),
                    rows.data() + i * row.size());
  }
  for (int i = 0; i < kCalls; ++i) hot_codec(rows, received);
}

}  // namespace
}  // namespace infemeral

int main(int argc, char** argv) {
  if (argc == 3 && std::strcmp(argv[1], "prepare") == 0) {
    infemeral::prepare(argv[2]);
  } else if (argc == 3 && std::strcmp(argv[1], "run") == 0) {
    infemeral::run(argv[2]);
  } else {
    std::fprintf(stderr, "usage: hot_functions prepare|run DIR\n");
    return 2;
  }
  return 0;
}
