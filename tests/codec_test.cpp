#include "net/codec.h"

#include <catch2/catch.hpp>
#include <chrono>
#include <cmath>
#include <cstring>

#include "net/frames.h"
#include "tests/test_random.h"

namespace infemeral {
namespace {

// Rows of cloaked states as they are: Gaussian.
std::vector<std::byte> gaussian_rows(WireDtype dtype, std::size_t rows, std::size_t cols) {
  std::vector<float> row(cols);
  std::vector<std::byte> bytes(rows * wire_row_bytes(dtype, cols));
  for (std::size_t i = 0; i < rows; ++i) {
    for (float& x : row) x = normal();
    encode_wire_row(dtype, row, bytes.data() + i * wire_row_bytes(dtype, cols));
  }
  return bytes;
}

std::vector<std::byte> unpack_ok(const PackedTensor& packed, std::size_t expected) {
  std::vector<std::byte> rows(3, std::byte{0x7f});
  const absl::Status status = unpack_tensor(packed, expected, rows);
  INFO(status);
  REQUIRE(status.ok());
  return rows;
}

void check_refused(const PackedTensor& packed, std::size_t expected) {
  std::vector<std::byte> rows;
  CHECK(unpack_tensor(packed, expected, rows).code() == absl::StatusCode::kInvalidArgument);
}

}  // namespace

TEST_CASE("random rows travel as they are, at every size around the limits") {
  for (std::size_t size : {0, 1, 576, 4095, 4096, 4097, 65535, 65536, 65537, 300000}) {
    std::vector<std::byte> rows(size);
    for (std::byte& b : rows) b = static_cast<std::byte>(rng()());
    const PackedTensor packed = pack_tensor(WireDtype::kI8, rows, 2);
    CHECK(!packed.lz4);
    CHECK(packed.bytes.size() == size);
    CHECK(unpack_ok(packed, size) == rows);
  }
}

TEST_CASE("repetitive rows are compressed above 4 KB and come back") {
  for (std::size_t size : {4096, 4097, 65536, 65537, 1000000}) {
    std::vector<std::byte> rows(size);
    for (std::size_t i = 0; i < size; ++i) rows[i] = static_cast<std::byte>(i % 100);
    const PackedTensor packed = pack_tensor(WireDtype::kF16, rows, 2);
    CHECK(packed.lz4 == (size > kMinCompressBytes));
    if (packed.lz4) CHECK(packed.bytes.size() < size / 8);
    CHECK(unpack_ok(packed, size) == rows);
  }
}

TEST_CASE("a row alone travels as it is") {
  const std::vector<std::byte> zeros(100000);
  CHECK(!pack_tensor(WireDtype::kF16, zeros, 1).lz4);
  CHECK(pack_tensor(WireDtype::kF16, zeros, 2).lz4);
  CHECK(!pack_rows(WireDtype::kF32, std::vector<float>(8192), 8192).lz4);
}

TEST_CASE("rows of values are packed and unpacked like their bytes") {
  const std::size_t hidden = 1025 + random_index(1000), count = 1 + random_index(5);
  CAPTURE(hidden, count);
  for (const WireDtype dtype : {WireDtype::kF32, WireDtype::kF16, WireDtype::kI8}) {
    for (const bool same : {false, true}) {
      const std::size_t row_bytes = wire_row_bytes(dtype, hidden);
      std::vector<float> values = normals(count * hidden);
      for (std::size_t i = hidden; same && i < values.size(); ++i) values[i] = values[i - hidden];
      std::vector<std::byte> wire(count * row_bytes);
      std::vector<float> expected(values.size());
      for (std::size_t i = 0; i < count; ++i) {
        const std::span<float> row = std::span<float>(values).subspan(i * hidden, hidden);
        encode_wire_row(dtype, row, wire.data() + i * row_bytes);
        decode_wire_row(dtype, wire.data() + i * row_bytes,
                        std::span<float>(expected).subspan(i * hidden, hidden));
      }
      const PackedTensor packed = pack_rows(dtype, values, hidden);
      CHECK(packed.bytes == pack_tensor(dtype, wire, count).bytes);
      CHECK(packed.lz4 == (same && count > 1 && wire.size() > kMinCompressBytes));
      const auto back = unpack_rows(packed, count, hidden);
      REQUIRE(back.ok());
      CHECK(*back == expected);
      CHECK(!unpack_rows(packed, count + 1, hidden).ok());
      CHECK(!unpack_rows(packed, count, hidden - 64).ok());

      if (dtype == WireDtype::kI8) continue;  // has no other values than finite ones
      for (const float bad : {std::nanf(""), -HUGE_VALF}) {
        std::vector<float> wrong = values;
        wrong[random_index(wrong.size())] = bad;
        CHECK(!all_finite(wrong));
        // An infinity is clamped in float16.
        const bool finite = dtype == WireDtype::kF16 && !std::isnan(bad);
        CHECK(unpack_rows(pack_rows(dtype, wrong, hidden), count, hidden).ok() == finite);
      }
      CHECK(all_finite(values));
    }
  }
}

TEST_CASE("a saving below an eighth is not taken") {
  // `zeros` of 64 Ki bytes compress to almost nothing, the rest does not.
  for (std::size_t zeros : {7500, 9000}) {
    std::vector<std::byte> rows(65536);
    for (std::size_t i = zeros; i < rows.size(); ++i) rows[i] = static_cast<std::byte>(rng()());
    const PackedTensor packed = pack_tensor(WireDtype::kF16, rows, 2);
    CHECK(packed.lz4 == (zeros > 65536 / 8));
    CHECK(unpack_ok(packed, rows.size()) == rows);
  }
}

TEST_CASE("Gaussian states are not worth compressing in any dtype") {
  for (WireDtype dtype : {WireDtype::kF32, WireDtype::kF16, WireDtype::kI8}) {
    const auto rows = gaussian_rows(dtype, 64, 4096);
    CHECK(!pack_tensor(dtype, rows, 64).lz4);
  }
}

TEST_CASE("packed tensors that do not make the expected bytes are refused") {
  std::vector<std::byte> rows(100000);
  for (std::size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<std::byte>(i / 64);
  const PackedTensor packed = pack_tensor(WireDtype::kF16, rows, 2);
  REQUIRE(packed.lz4);

  check_refused({.lz4 = false, .bytes = std::string(10, 'x')}, 11);
  check_refused({.lz4 = false, .bytes = std::string(10, 'x')}, 9);
  check_refused({.lz4 = false, .bytes = {}}, 1);
  check_refused(packed, rows.size() - 1);
  check_refused(packed, rows.size() + 1);
  check_refused({.lz4 = true, .bytes = {}}, rows.size());
  check_refused({.lz4 = true, .bytes = {}}, 0);
  // Small tensors are never compressed, and no block makes a terabyte out of nothing.
  check_refused({.lz4 = true, .bytes = packed.bytes}, 4096);
  check_refused(packed, std::size_t{1} << 40);
  check_refused(packed, packed.bytes.size() * 256);
  for (std::size_t size = 0; size < packed.bytes.size(); ++size) {
    check_refused({.lz4 = true, .bytes = packed.bytes.substr(0, size)}, rows.size());
  }
}

TEST_CASE("damaged blocks never write outside their rows") {
  // The sanitizers watch the exact-size buffer; the content is up to the channel's tags.
  std::vector<std::byte> rows(20000);
  for (std::size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<std::byte>(i / 64);
  const PackedTensor packed = pack_tensor(WireDtype::kF16, rows, 2);
  REQUIRE(packed.lz4);
  std::size_t refused = 0;
  for (int i = 0; i < 20000; ++i) {
    PackedTensor damaged = packed;
    damaged.bytes[rng()() % damaged.bytes.size()] = static_cast<char>(rng()());
    std::vector<std::byte> out;
    const absl::Status status = unpack_tensor(damaged, rows.size(), out);
    if (status.ok()) {
      REQUIRE(out.size() == rows.size());
    } else {
      REQUIRE(status.code() == absl::StatusCode::kInvalidArgument);
      ++refused;
    }
  }
  CHECK(refused > 0);
}

TEST_CASE("what LZ4 costs on a prefill that it cannot shrink", "[.timing]") {
  for (WireDtype dtype : {WireDtype::kF32, WireDtype::kF16, WireDtype::kI8}) {
    for (std::size_t rows : {1, 512}) {
      const auto bytes = gaussian_rows(dtype, rows, 4096);
      double best = 1e9, copy = 1e9;
      for (int i = 0; i < 20; ++i) {
        const auto start = std::chrono::steady_clock::now();
        const PackedTensor packed = pack_tensor(dtype, bytes, rows);
        const auto middle = std::chrono::steady_clock::now();
        const std::string plain(reinterpret_cast<const char*>(bytes.data()), bytes.size());
        const auto end = std::chrono::steady_clock::now();
        REQUIRE(packed.bytes == plain);
        using Ms = std::chrono::duration<double, std::milli>;
        best = std::min(best, Ms(middle - start).count());
        copy = std::min(copy, Ms(end - middle).count());
      }
      WARN(wire_dtype_name(dtype) << " " << bytes.size() << " bytes: pack " << best
                                  << " ms, of which a plain copy " << copy << " ms");
    }
  }
}

}  // namespace infemeral
