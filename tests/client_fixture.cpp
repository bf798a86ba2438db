#include "tests/client_fixture.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <utility>

#include "engine/fingerprint.h"
#include "engine/float16.h"
#include "engine/safetensors.h"
#include "tests/test_random.h"

namespace infemeral {

Client::Client(const ClientSizes& sizes) : hidden(sizes.hidden), vocab(sizes.vocab) {
  CloakSeed seed = CloakSeed::random();
  std::filesystem::create_directories(path());
  REQUIRE(seed.save(path() / "cloak.key").ok());
  Cloak cloak = Cloak::generate(seed, hidden).value();
  const bool folded = sizes.cloak == CloakMode::kFolded;
  q.assign(cloak.values().begin(), cloak.values().end());
  for (std::size_t i = 0; folded && i < hidden * hidden; ++i) {
    q[i] = f32_to_f16(i % (hidden + 1) == 0 ? 1 : 0);
  }
  if (sizes.cloak == CloakMode::kEager) {
    REQUIRE(cloak.save(path() / "cloak.safetensors", seed).ok());
  }
  manifest = {.model_type = "llama",
              .hidden_size = hidden,
              .vocab_size = vocab,
              .max_context = 64,
              .tied_embeddings = sizes.tied,
              .cloak_mode = sizes.cloak,
              .cloak_commitment = seed.commitment()};
  REQUIRE(save_client_manifest(manifest, path()).ok());

  for (std::size_t i = 0; i < vocab * hidden; ++i) embed.push_back(f32_to_f16(normal()));
  for (std::size_t i = 0; i < vocab * hidden; ++i) head.push_back(f32_to_f16(normal()));
  for (std::size_t i = 0; i < hidden; ++i) gain.push_back(folded ? 1 : 1 + normal(0.3f));
  if (sizes.tied) head = embed;
  std::vector<SafetensorsWriter::Declaration> tensors;
  if (!folded) tensors.push_back({"final_norm.weight", Dtype::kF32, {hidden}});
  tensors.push_back({"embed_tokens.weight", Dtype::kF16, {vocab, hidden}});
  if (!sizes.tied) tensors.push_back({"lm_head.weight", Dtype::kF16, {vocab, hidden}});
  auto writer =
      SafetensorsWriter::create(path() / "client.safetensors", tensors,
                                {{"tied_embeddings", sizes.tied ? "true" : "false"},
                                 {"cloak_commitment", fingerprint_text(seed.commitment())}},
                                0600);
  REQUIRE(writer.ok());
  if (!folded) REQUIRE((*writer)->write(std::as_bytes(std::span(gain))).ok());
  REQUIRE((*writer)->write(std::as_bytes(std::span(embed))).ok());
  if (!sizes.tied) REQUIRE((*writer)->write(std::as_bytes(std::span(head))).ok());
  REQUIRE((*writer)->finish().ok());
}

ClientFolder Client::open() const {
  auto folder = ClientFolder::open(path());
  INFO(folder.status().message());
  REQUIRE(folder.ok());
  return *std::move(folder);
}

std::vector<double> Client::cloaked(const std::vector<double>& x) const {
  std::vector<double> y(hidden, 0);
  for (std::size_t i = 0; i < hidden; ++i) {
    for (std::size_t j = 0; j < hidden; ++j) y[j] += x[i] * f16_to_f32(q[i * hidden + j]);
  }
  return y;
}

std::vector<double> Client::times_transpose(const std::vector<double>& y) const {
  std::vector<double> x(hidden, 0);
  for (std::size_t i = 0; i < hidden; ++i) {
    for (std::size_t j = 0; j < hidden; ++j) x[i] += y[j] * f16_to_f32(q[i * hidden + j]);
  }
  return x;
}

std::vector<double> Client::logits(const std::vector<double>& h) const {
  std::vector<double> result(vocab, 0);
  for (std::size_t t = 0; t < vocab; ++t) {
    for (std::size_t i = 0; i < hidden; ++i) {
      result[t] += f16_to_f32(head[t * hidden + i]) * (static_cast<double>(gain[i]) * h[i]);
    }
  }
  return result;
}

std::vector<double> Client::embedding(std::int32_t id) const {
  std::vector<double> x(hidden);
  for (std::size_t i = 0; i < hidden; ++i) {
    x[i] = f16_to_f32(embed[static_cast<std::size_t>(id) * hidden + i]);
  }
  return x;
}

double Client::largest_row() const {
  double largest = 0;
  for (std::size_t t = 0; t < vocab; ++t) {
    double squares = 0;
    for (std::size_t i = 0; i < hidden; ++i) {
      squares += std::pow(f16_to_f32(head[t * hidden + i]) * gain[i], 2);
    }
    largest = std::max(largest, std::sqrt(squares));
  }
  return largest;
}

double norm(const std::vector<double>& x) {
  double squares = 0;
  for (double v : x) squares += v * v;
  return std::sqrt(squares);
}

std::vector<double> random_row(std::size_t n) {
  std::vector<double> x(n);
  for (double& v : x) v = normal();
  return x;
}

std::vector<std::byte> encode(WireDtype dtype, const std::vector<double>& row) {
  const std::vector<float> values(row.begin(), row.end());
  std::vector<std::byte> bytes(wire_row_bytes(dtype, row.size()));
  encode_wire_row(dtype, values, bytes.data());
  return bytes;
}

double wire_error(WireDtype dtype) {
  switch (dtype) {
    case WireDtype::kF32:
      return 0x1p-24;
    case WireDtype::kF16:
      return 0x1p-11;
    case WireDtype::kI8:
      return 4.0 / 127;  // half a step of max/127; max is below 8 deviations
  }
  return 0;
}

// What that does not cover: an element near zero is off by half a step of the smallest binary16
// numbers, and in i8 the block's scale is, times up to 127.
static double wire_floor(WireDtype dtype, std::size_t hidden) {
  const double half_step = dtype == WireDtype::kF32   ? 0
                           : dtype == WireDtype::kF16 ? 0x1p-25
                                                      : 127 * 0x1p-25;
  return half_step * std::sqrt(static_cast<double>(hidden));
}

void check_embed(const Client& client, ClientBackend& backend, std::span<const std::int32_t> ids) {
  std::vector<std::vector<double>> expected_rows;
  for (std::int32_t id : ids) expected_rows.push_back(client.cloaked(client.embedding(id)));
  for (WireDtype dtype : kAllWires) {
    CAPTURE(backend.name().data(), wire_dtype_name(dtype).data(), client.hidden, ids.size());
    const std::size_t row_bytes = wire_row_bytes(dtype, client.hidden);
    std::vector<std::byte> out(ids.size() * row_bytes, std::byte{0xff});
    std::size_t neighbours = 0;
    PhaseTimes times;
    REQUIRE(backend.embed(ids, dtype, out, times).ok());
    CHECK(times.embed_ms >= 0);
    CHECK(times.sum() > 0);
    CHECK(times.sum() == times.embed_ms + times.cloak_ms);
    for (std::size_t i = 0; i < ids.size(); ++i) {
      const std::vector<double>& expected = expected_rows[i];
      // engine/wire_edges.h
      const std::vector<std::byte> bytes = encode(dtype, expected);
      if (dtype != WireDtype::kF32) {
        REQUIRE(std::memcmp(out.data() + i * row_bytes, bytes.data(), row_bytes) == 0);
        continue;
      }
      // A sum can lie so near to the middle of two floats that float64's own roundings decide.
      std::vector<float> row(client.hidden), nearest(client.hidden);
      decode_wire_row(dtype, out.data() + i * row_bytes, row);
      decode_wire_row(dtype, bytes.data(), nearest);
      for (std::size_t j = 0; j < row.size(); ++j) {
        if (row[j] == nearest[j]) continue;
        ++neighbours;
        REQUIRE(row[j] == std::nextafter(nearest[j], row[j]));
      }
    }
    CHECK(neighbours <= 2 + ids.size() * client.hidden / 10'000);
  }
}

void check_logits(const Client& client, ClientBackend& backend, double unit) {
  const std::vector<double> h = random_row(client.hidden);
  const std::vector<double> expected = client.logits(h);
  const std::vector<double> returned = client.cloaked(h);
  // What one multiplication with Q^T would give, in float64: the error of the float16 matrix.
  const std::vector<double> plain = client.logits(client.times_transpose(returned));
  double matrix_error = 0;
  for (std::size_t t = 0; t < client.vocab; ++t) {
    matrix_error = std::max(matrix_error, std::fabs(plain[t] - expected[t]));
  }
  for (WireDtype dtype : kAllWires) {
    CAPTURE(backend.name().data(), wire_dtype_name(dtype).data(), client.hidden);
    std::vector<float> logits(client.vocab, std::numeric_limits<float>::quiet_NaN());
    REQUIRE(backend.logits(encode(dtype, returned), dtype, logits).ok());
    double worst = 0;
    for (std::size_t t = 0; t < client.vocab; ++t) {
      REQUIRE(std::isfinite(logits[t]));
      worst = std::max(worst, std::fabs(logits[t] - expected[t]));
    }
    // |w . e| <= |w| |e|: rounding on the wire and in the sums; without refinement also Q's.
    const double sums = 3 * static_cast<double>(client.hidden) / 4 * unit;
    const double bound = client.largest_row() * (norm(h) * (wire_error(dtype) + sums) +
                                                 wire_floor(dtype, client.hidden)) +
                         (dtype == WireDtype::kF32 ? 0 : matrix_error);
    CHECK(worst <= bound);
    if (dtype == WireDtype::kF32 && matrix_error > 0) CHECK(worst < matrix_error / 10);
  }
}

}  // namespace infemeral
