// A client folder with random tables, for the tests of client backends: what a backend makes of it
// is held against float64 arithmetic on the same numbers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <vector>

#include "engine/backend.h"
#include "engine/client_folder.h"
#include "engine/wire.h"
#include "tests/tiny_model.h"

namespace infemeral {

inline constexpr WireDtype kAllWires[] = {WireDtype::kF32, WireDtype::kF16, WireDtype::kI8};

struct ClientSizes {
  std::size_t hidden = 96;
  std::size_t vocab = 301;
  bool tied = false;
  // kFolded: the random tables are taken as rotated ones, so that Q is the identity and gains are 1
  // in everything below. Not to be tied.
  CloakMode cloak = CloakMode::kLazy;
};

class Client {
 public:
  explicit Client(const ClientSizes& sizes);

  std::filesystem::path path() const { return folder_.path() / "client"; }
  ClientFolder open() const;

  // x * Q and y * Q^T with the float16 matrix, lm_head * (gain * h), and a row of the table.
  std::vector<double> cloaked(const std::vector<double>& x) const;
  std::vector<double> times_transpose(const std::vector<double>& y) const;
  std::vector<double> logits(const std::vector<double>& h) const;
  std::vector<double> embedding(std::int32_t id) const;
  // The largest norm of gain * a row of lm_head: |logit error| <= it * |error of h|.
  double largest_row() const;

  std::size_t hidden, vocab;
  ClientManifest manifest;
  std::vector<std::uint16_t> embed, head;  // V x H, binary16
  std::vector<std::uint16_t> q;            // H x H
  std::vector<float> gain;                 // H

 private:
  TempFolder folder_;
};

double norm(const std::vector<double>& x);
std::vector<double> random_row(std::size_t n);
std::vector<std::byte> encode(WireDtype dtype, const std::vector<double>& row);
// Relative rounding of a row in the wire format, in the 2-norm.
double wire_error(WireDtype dtype);

// What a backend must hold; Catch assertions.
void check_embed(const Client& client, ClientBackend& backend, std::span<const std::int32_t> ids);
// Of a random state, on every wire. `unit` is the largest relative error of one step of the
// backend's float32 sums: 2^-24 where they are rounded, 2^-23 where they are truncated.
void check_logits(const Client& client, ClientBackend& backend, double unit);

}  // namespace infemeral
