#include "engine/wire.h"

#include <catch2/catch.hpp>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "engine/float16.h"
#include "tests/test_random.h"

namespace infemeral {
namespace {

// Encodes into a buffer of exact size (so that a sanitizer sees an overrun) and decodes again.
std::vector<float> round_trip(WireDtype dtype, const std::vector<float>& row) {
  std::vector<std::byte> bytes(wire_row_bytes(dtype, row.size()));
  encode_wire_row(dtype, row, bytes.data());
  std::vector<float> back(row.size(), std::numeric_limits<float>::quiet_NaN());
  decode_wire_row(dtype, bytes.data(), back);
  return back;
}

}  // namespace

TEST_CASE("every binary16 value survives the way to float32 and back") {
  for (std::uint32_t half = 0; half < 0x10000; ++half) {
    const float value = f16_to_f32(static_cast<std::uint16_t>(half));
    if (std::isnan(value)) {
      REQUIRE((half & 0x7fff) > 0x7c00);
      REQUIRE(std::isnan(f16_to_f32(f32_to_f16(value))));
    } else {
      REQUIRE(f32_to_f16(value) == half);
    }
  }
}

#ifdef __FLT16_MANT_DIG__
TEST_CASE("float16 rounding equals the compiler's own") {
  for (int i = 0; i < 2'000'000; ++i) {
    const float value = std::bit_cast<float>(static_cast<std::uint32_t>(rng()()));
    if (std::isnan(value)) continue;
    const auto expected = std::bit_cast<std::uint16_t>(static_cast<_Float16>(value));
    if (f32_to_f16(value) != expected) {
      CAPTURE(value);
      REQUIRE(f32_to_f16(value) == expected);
    }
  }
}
#endif

TEST_CASE("bfloat16 rounds to nearest even and keeps NaN") {
  CHECK(f32_to_bf16(1.0f) == 0x3f80);
  CHECK(f32_to_bf16(std::bit_cast<float>(0x3f808000u)) == 0x3f80);  // tie, to even
  CHECK(f32_to_bf16(std::bit_cast<float>(0x3f818000u)) == 0x3f82);  // tie, to even
  CHECK(f32_to_bf16(std::bit_cast<float>(0x3f808001u)) == 0x3f81);
  CHECK(std::isnan(bf16_to_f32(f32_to_bf16(std::bit_cast<float>(0x7f800001u)))));
  CHECK(std::isinf(bf16_to_f32(f32_to_bf16(std::numeric_limits<float>::max()))));
}

TEST_CASE("wire rows have the documented size and error") {
  for (std::size_t cols : {1, 2, 63, 64, 65, 127, 576, 4096}) {
    for (float scale : {1e-6f, 1.0f, 3e3f}) {
      const std::vector<float> row = normals(cols, scale);
      CHECK(wire_row_bytes(WireDtype::kI8, cols) == 2 * ((cols + 63) / 64) + cols);
      CHECK(round_trip(WireDtype::kF32, row) == row);

      const std::vector<float> f16 = round_trip(WireDtype::kF16, row);
      const std::vector<float> i8 = round_trip(WireDtype::kI8, row);
      for (std::size_t j = 0; j < cols; ++j) {
        // Half a unit in the last place of binary16, or half its subnormal step.
        CHECK(std::fabs(f16[j] - row[j]) <= std::max(std::fabs(row[j]) * 0x1p-11f, 0x1p-25f));
        float max = 0;
        for (std::size_t i = j / 64 * 64; i < std::min(cols, j / 64 * 64 + 64); ++i) {
          max = std::max(max, std::fabs(row[i]));
        }
        // Half a step, plus what rounding the scale to binary16 (or its subnormal step) can add.
        CHECK(std::fabs(i8[j] - row[j]) <= max / 127 * 0.5f + max * 0x1p-10f + 127 * 0x1p-24f);
      }
    }
  }
}

TEST_CASE("rows of any bits are converted like their single values") {
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  const auto same = [](float a, float b) {
    return std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b) ||
           (std::isnan(a) && std::isnan(b));
  };
  for (int round = 0; round < 2000; ++round) {
    std::vector<float> row(1 + random_index(200));
    // All bits, or exponents that are neither clamped nor 0.
    const bool any = round % 2 == 0;
    for (float& x : row) {
      const auto bits = static_cast<std::uint32_t>(rng()());
      x = std::bit_cast<float>(any ? bits : (bits & 0x87ffffffu) + 0x34000000u);
    }
    std::vector<std::byte> f16(wire_row_bytes(WireDtype::kF16, row.size()));
    encode_wire_row(WireDtype::kF16, row, f16.data());
    std::vector<float> back(row.size());
    decode_wire_row(WireDtype::kF16, f16.data(), back);
    std::vector<std::byte> i8(wire_row_bytes(WireDtype::kI8, row.size()));
    encode_wire_row(WireDtype::kI8, row, i8.data());
    const std::size_t scales = 2 * ((row.size() + 63) / 64);
    for (std::size_t j = 0; j < row.size(); ++j) {
      CAPTURE(j, row[j]);
      std::uint16_t half = 0;
      std::memcpy(&half, f16.data() + 2 * j, 2);
      const float clamped = row[j] > 65504 ? 65504 : row[j] < -65504 ? -65504 : row[j];
      REQUIRE(same(f16_to_f32(half), f16_to_f32(f32_to_f16(clamped))));
      REQUIRE(same(back[j], f16_to_f32(half)));

      float max = 0;
      for (std::size_t i = j / 64 * 64; i < std::min(row.size(), j / 64 * 64 + 64); ++i) {
        if (std::fabs(row[i]) > max) max = std::fabs(row[i]);
      }
      std::memcpy(&half, i8.data() + 2 * (j / 64), 2);
      REQUIRE(half == f32_to_f16(std::min(max / 127.0f, 65504.0f)));
      const float scale = f16_to_f32(half);
      float scaled = row[j] * (scale > 0 ? 1.0f / scale : 0.0f);
      if (std::isnan(scaled)) scaled = 0;
      scaled = std::min(std::max(scaled, -127.0f), 127.0f);
      REQUIRE(static_cast<std::int8_t>(i8[scales + j]) == std::nearbyint(scaled));
    }
  }
}

TEST_CASE("values whose code an error could change are found, and few others") {
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  const auto code = [](WireDtype dtype, std::vector<float> row, std::size_t j, float x) {
    row[j] = x;
    std::vector<std::byte> bytes(wire_row_bytes(dtype, row.size()));
    encode_wire_row(dtype, row, bytes.data());
    return bytes;
  };
  for (const WireDtype dtype : {WireDtype::kF32, WireDtype::kF16, WireDtype::kI8}) {
    CAPTURE(wire_dtype_name(dtype).data());
    std::size_t n = 0, n_found = 0, n_changed = 0;
    for (int round = 0; round < 400; ++round) {
      // From numbers that binary16 keeps as subnormals to its largest.
      const float size = std::exp2(static_cast<float>(random_index(33)) - 20);
      const float error = size * std::exp2(-12 - static_cast<float>(random_index(10)));
      std::vector<float> row(1 + random_index(150));
      for (float& x : row) {
        x = size * normal();
        if (random_index(4) == 0) {  // on an edge, or nearly
          const std::uint16_t half = f32_to_f16(x);
          x = (f16_to_f32(half) + f16_to_f32(half + 1)) / 2 + error * normal();
        }
      }
      std::vector<bool> found(row.size());
      const auto find = [&](const auto& append) {
        std::vector<std::uint32_t> columns = {77};  // is appended to
        append(columns);
        REQUIRE(columns[0] == 77);
        for (std::size_t c = 1; c < columns.size(); ++c) {
          REQUIRE((c == 1 || columns[c] > columns[c - 1]));
          found.at(columns[c]) = true;
        }
      };
      if (dtype == WireDtype::kI8) {
        find([&](auto& columns) { append_scale_edges(row, error, columns); });
      }
      find([&](auto& columns) { append_code_edges(dtype, row, error, columns); });
      for (std::size_t j = 0; j < row.size(); ++j) {
        const auto as_it_is = code(dtype, row, j, row[j]);
        const bool changes = code(dtype, row, j, row[j] - 0.99f * error) != as_it_is ||
                             code(dtype, row, j, row[j] + 0.99f * error) != as_it_is;
        CAPTURE(size, error, row[j], j, row.size());
        if (dtype != WireDtype::kF32 && changes) REQUIRE(found[j]);
        if (error <= size * 0x1p-18f) ++n, n_found += found[j], n_changed += changes;
      }
    }
    if (dtype == WireDtype::kF32) CHECK(n_found == 0);
    CHECK(n_found < n_changed * 2 + n / 20);
    if (dtype == WireDtype::kF16) CHECK(n_changed > n / 50);
  }
}

TEST_CASE("values beyond float16 are clamped, zeros stay zero") {
  const std::vector<float> huge = {1e30f, -1e30f, 0.0f};
  CHECK(round_trip(WireDtype::kF16, huge) == std::vector<float>{65504, -65504, 0});
  for (float x : round_trip(WireDtype::kI8, huge)) CHECK(std::isfinite(x));
  CHECK(round_trip(WireDtype::kI8, {0, 0, 0}) == std::vector<float>{0, 0, 0});
}

TEST_CASE("dtype names and numbers from outside") {
  for (WireDtype dtype : {WireDtype::kF32, WireDtype::kF16, WireDtype::kI8}) {
    CHECK(parse_wire_dtype(wire_dtype_name(dtype)) == dtype);
    CHECK(wire_dtype_from_number(static_cast<std::uint32_t>(dtype)) == dtype);
  }
  CHECK(!parse_wire_dtype("f64"));
  CHECK(!wire_dtype_from_number(0));
  CHECK(!wire_dtype_from_number(4));
}

}  // namespace infemeral
