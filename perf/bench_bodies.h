// A body for measuring what is around a body, and rows for it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <memory>
#include <random>
#include <span>
#include <vector>

#include "engine/body.h"
#include "engine/wire.h"

namespace infemeral {

// A row as it travels: cloaked states are close to Gaussian noise.
inline std::vector<std::byte> random_row(WireDtype dtype, std::size_t hidden_size,
                                         std::mt19937_64& random) {
  std::normal_distribution<float> normal;
  std::vector<float> row(hidden_size);
  for (float& x : row) x = normal(random);
  std::vector<std::byte> bytes(wire_row_bytes(dtype, hidden_size));
  encode_wire_row(dtype, row, bytes.data());
  return bytes;
}

// Gives back the rows that it is given.
class EchoBody final : public Body {
 public:
  explicit EchoBody(std::size_t hidden_size) {
    info_.description = "echo";
    info_.hidden_size = static_cast<std::uint32_t>(hidden_size);
    info_.max_context = 1 << 20;
    info_.kv_bytes_per_token = 1;
  }
  const BodyInfo& info() const override { return info_; }
  absl::StatusOr<std::unique_ptr<BodySession>> new_session() override {
    return std::make_unique<Session>();
  }
  void run(std::span<BodyStep> steps) override {
    for (BodyStep& step : steps) {
      static_cast<Session*>(step.session)->length = step.start_pos + step.rows;
      std::copy(step.states.end() - static_cast<std::ptrdiff_t>(step.out.size()), step.states.end(),
                step.out.begin());
      step.status = absl::OkStatus();
    }
  }

 private:
  struct Session final : BodySession {
    std::uint32_t kv_len() const override { return length; }
    std::size_t kv_bytes() const override { return length; }
    std::uint32_t length = 0;
  };
  BodyInfo info_;
};

}  // namespace infemeral
