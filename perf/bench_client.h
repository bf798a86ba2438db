// A client folder of random weights to measure with.
#pragma once

#include <cstddef>
#include <filesystem>
#include <random>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "engine/client_folder.h"
#include "engine/fingerprint.h"
#include "engine/float16.h"
#include "engine/safetensors.h"

namespace infemeral {

// Tied tables, values from N(0, 1); two for kFolded, which takes them as rotated. With an eager
// cloak the matrix is made and stored, which takes seconds at 4096.
inline absl::Status make_bench_client(const std::filesystem::path& path, std::size_t vocab,
                                      std::size_t hidden, CloakMode mode) {
  const bool folded = mode == CloakMode::kFolded;
  const CloakSeed seed = CloakSeed::random();
  absl::Status status = seed.save(path / "cloak.key");
  if (status.ok() && mode == CloakMode::kEager) {
    auto cloak = Cloak::generate(seed, hidden);
    if (!cloak.ok()) return cloak.status();
    status = cloak->save(path / "cloak.safetensors", seed);
  }
  if (!status.ok()) return status;
  status = save_client_manifest({.model_type = "llama",
                                 .hidden_size = hidden,
                                 .vocab_size = vocab,
                                 .max_context = 4096,
                                 .tied_embeddings = !folded,
                                 .cloak_mode = mode,
                                 .cloak_commitment = seed.commitment()},
                                path);
  if (!status.ok()) return status;
  std::vector<SafetensorsWriter::Declaration> tensors = {
      {"embed_tokens.weight", Dtype::kF16, {vocab, hidden}}};
  if (folded) {
    tensors.push_back({"lm_head.weight", Dtype::kF16, {vocab, hidden}});
  } else {
    tensors.insert(tensors.begin(), {"final_norm.weight", Dtype::kF32, {hidden}});
  }
  auto writer =
      SafetensorsWriter::create(path / "client.safetensors", tensors,
                                {{"tied_embeddings", folded ? "false" : "true"},
                                 {"cloak_commitment", fingerprint_text(seed.commitment())}},
                                0600);
  if (!writer.ok()) return writer.status();
  if (!folded) {
    const std::vector<float> gain(hidden, 1.0f);
    status = (*writer)->write(std::as_bytes(std::span(gain)));
  }
  // Normal numbers from a table: a billion draws would take longer than the measurement.
  std::mt19937_64 rng{std::random_device{}()};
  std::normal_distribution<float> normal;
  std::vector<std::uint16_t> table(1 << 16), row(hidden);
  for (std::uint16_t& x : table) x = f32_to_f16(normal(rng));
  for (std::size_t i = 0; status.ok() && i < (folded ? 2 : 1) * vocab; ++i) {
    std::uint64_t bits = 0;
    for (std::size_t j = 0; j < hidden; ++j) {
      bits = j % 4 == 0 ? rng() : bits >> 16;
      row[j] = table[bits & 0xffff];
    }
    status = (*writer)->write(std::as_bytes(std::span(row)));
  }
  return status.ok() ? (*writer)->finish() : status;
}

// Removed at the end, with everything in it.
struct BenchFolder {
  std::filesystem::path path;
  explicit BenchFolder(const std::string& name)
      : path(std::filesystem::temp_directory_path() / name) {
    std::filesystem::remove_all(path);
    std::filesystem::create_directories(path);
  }
  ~BenchFolder() { std::filesystem::remove_all(path); }
  BenchFolder(const BenchFolder&) = delete;
  BenchFolder& operator=(const BenchFolder&) = delete;
};

}  // namespace infemeral
