// Every instruction-set path that this machine has, against float64 sums, on exact-size buffers
// that start at odd addresses (the address sanitizer sees a read beyond either end).
#include "cpu/simd/kernels.h"

#include <algorithm>
#include <atomic>
#include <catch2/catch.hpp>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <memory>
#include <numeric>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "cpu/huge_pages.h"
#include "cpu/linear.h"
#include "cpu/parallel.h"
#include "cpu/simd/dispatch.h"
#include "engine/float16.h"
#include "tests/page_advice.h"
#include "tests/test_random.h"
#include "tests/tiny_model.h"

namespace infemeral {
namespace {

using simd::Format;
using simd::Kernels;
constexpr double kEps = 0x1p-24;  // half a unit in the last place of float32
const float kNan = std::numeric_limits<float>::quiet_NaN();

std::size_t bytes_of(Format format) {
  return format == Format::kF32 ? 4 : format == Format::kI8 ? 1 : 2;
}

// Weights in a format, at an address that is a multiple of the element size and of nothing larger,
// and the values that they stand for.
struct Weights {
  Weights(Format format, std::size_t n) : values(normals(n)) {
    const std::size_t size = bytes_of(format);
    storage.reset(new std::byte[n * size + size]);
    data = storage.get() + size;
    for (std::size_t i = 0; i < n; ++i) {
      if (format == Format::kF32) {
        std::memcpy(data + 4 * i, &values[i], 4);
      } else if (format == Format::kI8) {
        const auto integer = static_cast<std::int8_t>(static_cast<int>(rng()() % 256) - 128);
        std::memcpy(data + i, &integer, 1);
        values[i] = integer;
      } else {
        // A few subnormals of binary16 among the rest.
        if (i % 17 == 5) values[i] *= 0x1p-17f;
        const std::uint16_t bits =
            format == Format::kF16 ? f32_to_f16(values[i]) : f32_to_bf16(values[i]);
        std::memcpy(data + 2 * i, &bits, 2);
        values[i] = format == Format::kF16 ? f16_to_f32(bits) : bf16_to_f32(bits);
      }
    }
  }
  std::vector<float> values;
  std::unique_ptr<std::byte[]> storage;
  std::byte* data;
};

const Format kAllFormats[] = {Format::kF32, Format::kF16, Format::kBF16, Format::kI8};

std::vector<float> matmul(const Kernels& kernels, Format format, const std::vector<float>& a,
                          const std::byte* w, std::size_t m, std::size_t n, std::size_t k) {
  std::vector<float> c(m * n, kNan);
  kernels.matmul[static_cast<std::size_t>(format)](
      {.a = a.data(), .lda = k, .w = w, .ldw = k, .c = c.data(), .ldc = n, .m = m, .n = n, .k = k});
  return c;
}

bool same_bits(const float* a, const float* b, std::size_t n) {
  return std::memcmp(a, b, n * sizeof(float)) == 0;
}

// Sets an environment variable while it lives.
class ScopedEnv {
 public:
  ScopedEnv(const char* name, const char* value) : name_(name) {
    if (const char* old = std::getenv(name)) old_ = old;
    setenv(name, value, 1);
  }
  ~ScopedEnv() { old_.empty() ? unsetenv(name_) : setenv(name_, old_.c_str(), 1); }

 private:
  const char* name_;
  std::string old_;
};

}  // namespace

TEST_CASE("matmul equals float64 sums for every path, format and size") {
  for (const Kernels* kernels : simd::available_kernels()) {
    for (Format format : kAllFormats) {
      for (std::size_t k : {1, 3, 7, 15, 16, 63, 64, 65, 576, 1023, 1025, 2500, 4096}) {
        const std::size_t m = 1 + rng()() % 14, n = 1 + rng()() % 40;
        CAPTURE(kernels->name, static_cast<int>(format), m, n, k);
        const std::vector<float> a = normals(m * k);
        const Weights w(format, n * k);
        const std::vector<float> c = matmul(*kernels, format, a, w.data, m, n, k);
        double worst = 0;
        for (std::size_t i = 0; i < m; ++i) {
          for (std::size_t j = 0; j < n; ++j) {
            double sum = 0, magnitude = 0;
            for (std::size_t t = 0; t < k; ++t) {
              const double x = static_cast<double>(a[i * k + t]) * w.values[j * k + t];
              sum += x;
              magnitude += std::fabs(x);
            }
            // Higham, "Accuracy and stability of numerical algorithms", 3.1: each product goes
            // through at most k/4 + 4 additions on the narrowest path.
            const double bound = (static_cast<double>(k) / 4 + 6) * kEps * magnitude;
            const double error = std::fabs(c[i * n + j] - sum);
            worst = std::max(worst, error / (bound + 1e-300));
          }
        }
        CHECK(worst <= 1);
      }
    }
  }
}

TEST_CASE("an element's bits do not depend on the rows and columns around it") {
  for (const Kernels* kernels : simd::available_kernels()) {
    for (Format format : kAllFormats) {
      for (std::size_t k : {5, 64, 576, 1500, 2049}) {
        const std::size_t m = 29, n = 75;
        CAPTURE(kernels->name, static_cast<int>(format), k);
        const std::vector<float> a = normals(m * k);
        const Weights w(format, n * k);
        const std::vector<float> prefill = matmul(*kernels, format, a, w.data, m, n, k);
        // m decode steps of one row.
        for (std::size_t i = 0; i < m; ++i) {
          const std::vector<float> row(a.begin() + static_cast<std::ptrdiff_t>(i * k),
                                       a.begin() + static_cast<std::ptrdiff_t>((i + 1) * k));
          const std::vector<float> c = matmul(*kernels, format, row, w.data, 1, n, k);
          REQUIRE(same_bits(c.data(), &prefill[i * n], n));
        }
        // Every number of rows up to a few tiles, and columns cut anywhere.
        for (std::size_t rows = 2; rows <= 14; ++rows) {
          const std::size_t first = rng()() % n, count = 1 + rng()() % (n - first);
          const std::size_t size = bytes_of(format);
          const std::vector<float> part(a.begin(),
                                        a.begin() + static_cast<std::ptrdiff_t>(rows * k));
          const std::vector<float> c =
              matmul(*kernels, format, part, w.data + first * k * size, rows, count, k);
          for (std::size_t i = 0; i < rows; ++i) {
            REQUIRE(same_bits(&c[i * count], &prefill[i * n + first], count));
          }
        }
        // Rows picked one by one.
        for (std::size_t count : {1, 2, 7, 8, 9, 23}) {
          const std::size_t size = bytes_of(format);
          std::vector<const void*> rows(count);
          std::vector<float> expected(count), c(count + 1, kNan);
          for (std::size_t j = 0; j < count; ++j) {
            const std::size_t row = rng()() % n;
            rows[j] = w.data + row * k * size;
            expected[j] = prefill[row];
          }
          kernels->matmul_picked[static_cast<std::size_t>(format)](
              {.a = a.data(), .rows = rows.data(), .c = c.data(), .n = count, .k = k});
          REQUIRE(same_bits(c.data(), expected.data(), count));
          REQUIRE(std::isnan(c[count]));
        }
      }
    }
  }
}

TEST_CASE("much of W at once gives the bits that little of it gives") {
  for (const Kernels* kernels : simd::available_kernels()) {
    for (Format format : kAllFormats) {
      const std::size_t n = 301, k = 1777, size = bytes_of(format);
      CAPTURE(kernels->name, static_cast<int>(format));
      const std::vector<float> a = normals(k);
      const Weights w(format, n * k);  // above 1 MiB
      const std::vector<float> c = matmul(*kernels, format, a, w.data, 1, n, k);
      for (std::size_t j = 0; j < n; ++j) {
        const std::vector<float> one = matmul(*kernels, format, a, w.data + j * k * size, 1, 1, k);
        REQUIRE(same_bits(one.data(), &c[j], 1));
      }
    }
  }
}

TEST_CASE("strides leave what lies between the rows alone") {
  for (const Kernels* kernels : simd::available_kernels()) {
    const std::size_t m = 9, n = 21, k = 70, lda = 81, ldw = 93, ldc = 37;
    const std::vector<float> a = normals((m - 1) * lda + k);
    const Weights w(Format::kF16, (n - 1) * ldw + k);
    std::vector<float> c((m - 1) * ldc + n, 7);
    kernels->matmul[1]({.a = a.data(),
                        .lda = lda,
                        .w = w.data,
                        .ldw = ldw,
                        .c = c.data(),
                        .ldc = ldc,
                        .m = m,
                        .n = n,
                        .k = k});
    for (std::size_t i = 0; i < c.size(); ++i) {
      const std::size_t row = i / ldc, column = i % ldc;
      if (column >= n) {
        REQUIRE(c[i] == 7);
        continue;
      }
      double sum = 0, magnitude = 0;
      for (std::size_t t = 0; t < k; ++t) {
        const double x = static_cast<double>(a[row * lda + t]) * w.values[column * ldw + t];
        sum += x;
        magnitude += std::fabs(x);
      }
      REQUIRE(std::fabs(c[i] - sum) <= (k / 4.0 + 6) * kEps * magnitude);
    }
  }
}

TEST_CASE("sums of binary16 products are as near to exact ones as sum_error says") {
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  for (const Kernels* kernels : simd::available_kernels()) {
    for (std::size_t k :
         {64 + random_index(64), 500 + random_index(200), 4000 + random_index(200)}) {
      CAPTURE(kernels->name, k);
      const std::size_t n = 2000;
      const Weights w(Format::kF16, n * k);
      std::vector<float> a = normals(k), c(n);
      for (float& x : a) x = f16_to_f32(f32_to_f16(x));
      kernels->matmul[static_cast<std::size_t>(Format::kF16)]({.a = a.data(),
                                                               .lda = k,
                                                               .w = w.data,
                                                               .ldw = k,
                                                               .c = c.data(),
                                                               .ldc = n,
                                                               .m = 1,
                                                               .n = n,
                                                               .k = k});
      double squares_a = 0, worst = 0, mean = 0;
      for (float x : a) squares_a += static_cast<double>(x) * x;
      for (std::size_t j = 0; j < n; ++j) {
        double sum = 0, squares = 0;
        for (std::size_t i = 0; i < k; ++i) {
          const double weight = w.values[j * k + i];
          sum += a[i] * weight;
          squares += weight * weight;
        }
        const double error = std::fabs(c[j] - sum) / std::sqrt(squares * squares_a);
        worst = std::max(worst, error);
        mean += error * error / static_cast<double>(n);
      }
      CHECK(worst < 2 * kernels->sum_error);
      CHECK(std::sqrt(mean) < kernels->sum_error / 5);
    }
  }
}

TEST_CASE("exact_dot is the sum without its roundings") {
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  for (const Kernels* kernels : simd::available_kernels()) {
    for (std::size_t n :
         {std::size_t{1}, std::size_t{3}, std::size_t{64}, 1 + random_index(5000)}) {
      CAPTURE(kernels->name, n);
      const Weights w(Format::kF16, n);
      std::vector<float> x(n);
      long double sum = 0, magnitudes = 0;
      for (std::size_t i = 0; i < n; ++i) {
        // Sums that leave little of what went into them.
        x[i] = f16_to_f32(f32_to_f16(i % 2 == 1 ? -x[i - 1] * w.values[i - 1] / w.values[i]
                                                : normal() * std::exp2(normal())));
        if (!std::isfinite(x[i]) || std::fabs(x[i]) > 60000) x[i] = 1;
        const long double product = static_cast<long double>(x[i]) * w.values[i];
        sum += product;
        magnitudes += std::fabs(product);
      }
      const double got =
          kernels->exact_dot(x.data(), reinterpret_cast<const std::uint16_t*>(w.data), n);
      CHECK(std::fabs(got - sum) <= magnitudes * 0x1p-44L);
    }
  }
}

TEST_CASE("accumulate adds A * W to C") {
  for (const Kernels* kernels : simd::available_kernels()) {
    for (Format format : {Format::kF32, Format::kF16}) {
      for (std::size_t n : {1, 5, 16, 31, 64, 80, 128, 133}) {
        const std::size_t m = 1 + rng()() % 11, k = 1 + rng()() % 300;
        CAPTURE(kernels->name, static_cast<int>(format), m, n, k);
        const std::vector<float> a = normals(m * k);
        const Weights w(format, n * k);
        const std::vector<float> before = normals(m * n);
        std::vector<float> c = before;
        const auto run = [&](const float* rows, float* out, std::size_t count) {
          kernels->accumulate[static_cast<std::size_t>(format)]({.a = rows,
                                                                 .lda = k,
                                                                 .w = w.data,
                                                                 .ldw = n,
                                                                 .c = out,
                                                                 .ldc = n,
                                                                 .m = count,
                                                                 .n = n,
                                                                 .k = k});
        };
        run(a.data(), c.data(), m);
        for (std::size_t i = 0; i < m; ++i) {
          for (std::size_t j = 0; j < n; ++j) {
            double sum = before[i * n + j], magnitude = std::fabs(sum);
            for (std::size_t t = 0; t < k; ++t) {
              const double x = static_cast<double>(a[i * k + t]) * w.values[t * n + j];
              sum += x;
              magnitude += std::fabs(x);
            }
            const double bound = 2 * static_cast<double>(k + 1) * kEps * magnitude;
            REQUIRE(std::fabs(c[i * n + j] - sum) <= bound);
          }
          std::vector<float> alone(before.begin() + static_cast<std::ptrdiff_t>(i * n),
                                   before.begin() + static_cast<std::ptrdiff_t>((i + 1) * n));
          run(&a[i * k], alone.data(), 1);
          REQUIRE(same_bits(alone.data(), &c[i * n], n));
        }
      }
    }
  }
}

TEST_CASE("softmax is exp, to two units in the last place") {
  for (const Kernels* kernels : simd::available_kernels()) {
    for (std::size_t n : {1, 2, 7, 16, 33, 1000, 4097}) {
      CAPTURE(kernels->name, n);
      const std::vector<float> x = normals(n, 20);
      const float scale = 0.125f;
      std::vector<float> e = x;
      const float sum = kernels->softmax(e.data(), n, scale);
      const float max = *std::max_element(x.begin(), x.end());
      double total = 0;
      for (std::size_t i = 0; i < n; ++i) {
        const float argument = (x[i] - max) * scale;
        const double expected = std::exp(static_cast<double>(argument));
        total += expected;
        REQUIRE(std::fabs(e[i] - expected) <= 2 * 2 * kEps * expected);
      }
      CHECK(std::fabs(sum - total) <= (static_cast<double>(n) / 4 + 12) * kEps * total);
    }
    // Far below the maximum: nothing, and no surprises.
    std::vector<float> far(40, -1e30f);
    far[3] = 5;
    CHECK(kernels->softmax(far.data(), far.size(), 1) == Approx(1));
    CHECK(far[3] == 1);
    CHECK(far[39] < 1e-37f);
  }
}

TEST_CASE("swiglu, rms_norm and the float16 conversions equal their definitions") {
  for (const Kernels* kernels : simd::available_kernels()) {
    for (std::size_t n : {1, 7, 16, 64, 65, 576, 4096}) {
      CAPTURE(kernels->name, n);
      const std::vector<float> gate = normals(n, 30), up = normals(n, 3);
      std::vector<float> x = gate;
      kernels->swiglu(x.data(), up.data(), n);
      for (std::size_t i = 0; i < n; ++i) {
        const double g = gate[i], expected = g / (1 + std::exp(-g)) * up[i];
        REQUIRE(std::fabs(x[i] - expected) <= 10 * kEps * std::fabs(expected) + 1e-30);
      }

      const float eps = 1e-5f;
      std::vector<float> normed(n, kNan), in_place = gate;
      kernels->rms_norm(gate.data(), up.data(), eps, n, normed.data());
      kernels->rms_norm(gate.data(), up.data(), eps, n, in_place.data());
      CHECK(same_bits(normed.data(), in_place.data(), n));
      double squares = 0;
      for (float v : gate) squares += static_cast<double>(v) * v;
      const double inverse = 1 / std::sqrt(squares / static_cast<double>(n) + eps);
      for (std::size_t i = 0; i < n; ++i) {
        const double expected = gate[i] * inverse * up[i];
        const double terms = static_cast<double>(n) / 8 + 12;
        REQUIRE(std::fabs(normed[i] - expected) <= terms * kEps * std::fabs(expected));
      }

      std::vector<std::uint16_t> halves(n, 0xffff);
      std::vector<float> wide = normals(n, 1e-6f);
      for (std::size_t i = 0; i < n; i += 3) wide[i] = gate[i] * 1000;
      kernels->to_f16(wide.data(), n, halves.data());
      std::vector<float> back(n, kNan);
      kernels->from_f16(halves.data(), n, back.data());
      for (std::size_t i = 0; i < n; ++i) {
        REQUIRE(halves[i] == f32_to_f16(std::clamp(wide[i], -65504.0f, 65504.0f)));
        REQUIRE(back[i] == f16_to_f32(halves[i]));
      }
    }
  }
}

TEST_CASE("every binary16 number is widened as engine/float16.h does it") {
  std::vector<std::uint16_t> all(65536);
  for (std::size_t i = 0; i < all.size(); ++i) all[i] = static_cast<std::uint16_t>(i);
  for (const Kernels* kernels : simd::available_kernels()) {
    std::vector<float> wide(all.size());
    kernels->from_f16(all.data(), all.size(), wide.data());
    for (std::size_t i = 0; i < all.size(); ++i) {
      const float expected = f16_to_f32(all[i]);
      if (std::isnan(expected)) {
        REQUIRE(std::isnan(wide[i]));
      } else {
        REQUIRE(std::bit_cast<std::uint32_t>(wide[i]) == std::bit_cast<std::uint32_t>(expected));
      }
    }
  }
}

TEST_CASE("NaN comes out as NaN") {
  for (const Kernels* kernels : simd::available_kernels()) {
    CAPTURE(kernels->name);
    for (std::size_t bad : {0, 17, 38}) {
      std::vector<float> x = normals(39);
      x[bad] = kNan;
      const std::vector<float> ones(39, 1);
      std::vector<float> e = x;
      CHECK(std::isnan(kernels->softmax(e.data(), e.size(), 1)));
      std::vector<float> g = x;
      kernels->swiglu(g.data(), ones.data(), g.size());
      CHECK(std::isnan(g[bad]));
      CHECK(!std::isnan(g[bad == 0 ? 1 : bad - 1]));
      std::vector<float> normed(39);
      kernels->rms_norm(x.data(), ones.data(), 0, 39, normed.data());
      CHECK(std::isnan(normed[5]));
    }
  }
}

TEST_CASE("linear: several products in one loop, with biases, whatever the number of threads") {
  const std::size_t k = 200, m = 5;
  const std::vector<float> x = normals(m * k);
  const Weights w0(Format::kF16, 96 * k), w1(Format::kF16, 33 * k), w2(Format::kF16, 400 * k);
  const Matrix matrices[] = {{Format::kF16, w0.data, 96, k},
                             {Format::kF16, w1.data, 33, k},
                             {Format::kF16, w2.data, 400, k}};
  const std::vector<float> bias = normals(33);
  for (const Kernels* kernels : simd::available_kernels()) {
    std::vector<std::vector<float>> results;
    for (int threads : {1, 2, 3}) {
      ThreadPool pool(threads);
      std::vector<float> out(m * (96 + 33 + 400), kNan);
      const Rows input{const_cast<float*>(x.data()), k};
      const Linear products[] = {{&matrices[0], nullptr, {out.data(), 96}},
                                 {&matrices[1], bias.data(), {out.data() + m * 96, 33}},
                                 {&matrices[2], nullptr, {out.data() + m * 129, 400}}};
      linear(*kernels, pool, products, input, m);
      results.push_back(out);
      for (std::size_t i = 0; i < m; ++i) {
        const std::vector<float> row(&x[i * k], &x[i * k] + k);
        std::vector<float> alone = matmul(*kernels, Format::kF16, row, w1.data, 1, 33, k);
        for (std::size_t j = 0; j < 33; ++j) alone[j] += bias[j];
        REQUIRE(same_bits(alone.data(), &out[m * 96 + i * 33], 33));
      }
    }
    CHECK(same_bits(results[0].data(), results[1].data(), results[0].size()));
    CHECK(same_bits(results[0].data(), results[2].data(), results[0].size()));
  }
}

TEST_CASE("an array lies on huge pages where it fills one, and can be wiped") {
  for (const std::size_t bytes : {std::size_t{1000}, std::size_t{5} << 19}) {
    HugeArray<std::uint16_t> array(bytes / 2);
    CHECK(array.bytes() == bytes);
    CHECK(reinterpret_cast<std::uintptr_t>(array.data()) % 64 == 0);
    std::uint16_t* const last = array.data() + bytes / 2 - 1;
    std::fill(array.data(), last + 1, std::uint16_t{0xbeef});
    const bool whole_pages = bytes >= 2u << 20;
    CHECK(asked_for_huge_pages(last) == (whole_pages && has_huge_pages()));
    array.wipe();
    CHECK(std::count(array.data(), last + 1, 0) == static_cast<std::ptrdiff_t>(bytes / 2));
  }
}

TEST_CASE("for_ranges covers every index once, with aligned cuts") {
  for (int threads : {1, 2, 5}) {
    ThreadPool pool(threads);
    for (std::size_t n : {0, 1, 7, 8, 9, 100, 1001}) {
      for (std::size_t grain : {1, 16, 5000}) {
        std::vector<int> seen(n, 0);
        pool.for_ranges(n, grain, 8, [&](const Range& range) {
          if (range.begin % 8 != 0) std::abort();
          if (range.worker >= static_cast<std::size_t>(pool.threads())) std::abort();
          for (std::size_t i = range.begin; i < range.end; ++i) ++seen[i];
        });
        CHECK(std::count(seen.begin(), seen.end(), 1) == static_cast<std::ptrdiff_t>(n));
      }
    }
  }
  CHECK(physical_cores() >= 1);
}

TEST_CASE("a control group's quota limits the threads, and those above it do") {
  const TempFolder root;
  const auto quota = [&](const std::string& text) {
    std::istringstream membership(text);
    return cpu_quota(membership, root.path());
  };
  const auto set = [&](const char* group, const char* text) {
    std::filesystem::create_directories(root.path() / group);
    std::ofstream(root.path() / group / "cpu.max") << text;
  };
  CHECK(quota("") == std::nullopt);
  CHECK(quota("1:cpu:/a\n") == std::nullopt);
  CHECK(quota("1:cpu:/a\n0::/\n") == std::nullopt);
  set("a/b", "250000 100000\n");
  CHECK(quota("1:cpu:/a\n0::/a/b\n") == 3);
  CHECK(quota("0::/a/b/c\n") == 3);
  CHECK(quota("0::/a\n") == std::nullopt);
  set("a", "max 100000\n");
  CHECK(quota("0::/a\n") == std::nullopt);
  CHECK(quota("0::/a/b\n") == 3);
  set("a", "50000 100000\n");
  CHECK(quota("0::/a/b\n") == 1);
  set("", "200000 100000\n");
  CHECK(quota("0::/other\n") == 2);
  CHECK(quota("0::/../../other\n") == 2);
}

TEST_CASE("what a loop's body throws reaches the caller, and the pool goes on") {
  for (const int threads : {1, 3}) {
    ThreadPool pool(threads);
    for (int round = 0; round < 50; ++round) {
      const std::size_t bad = rng()() % 100;
      std::atomic<std::size_t> done = 0;
      const auto loop = [&](bool throws) {
        done = 0;
        pool.for_ranges(100, 1, 1, [&](const Range& range) {
          if (throws && range.begin <= bad && bad < range.end) throw std::bad_alloc();
          done += range.end - range.begin;
        });
      };
      CHECK_THROWS_AS(loop(true), std::bad_alloc);
      CHECK_NOTHROW(loop(false));
      CHECK(done == 100);
    }
  }
}

TEST_CASE(
    "pools of one process, each with its own thread, leave out nothing and do nothing twice") {
  // Loops long enough for workers to sleep in between, and short enough for them to come late.
  constexpr int kPools = 3, kLoops = 4000;
  std::vector<int> wrong(kPools, 0);
  std::vector<std::thread> owners;
  for (int owner = 0; owner < kPools; ++owner) {
    owners.emplace_back([owner, &wrong] {
      for (int loop = 0; loop < kLoops;) {
        ThreadPool pool(owner + 1);  // some are the process's only one for a while
        for (int i = 0; i < 400; ++i, ++loop) {
          const std::size_t n = static_cast<std::size_t>(loop % 97);
          std::vector<int> seen(n, 0);
          std::vector<std::size_t> done(static_cast<std::size_t>(pool.threads()), 0);
          pool.for_ranges(n, 1, 1, [&](const Range& range) {
            done[range.worker] += range.end - range.begin;
            for (std::size_t j = range.begin; j < range.end; ++j) seen[j] += loop + 1;
          });
          int& errors = wrong[static_cast<std::size_t>(owner)];
          for (int value : seen) errors += value != loop + 1;
          errors += std::accumulate(done.begin(), done.end(), std::size_t{0}) != n;
          if (loop % 500 == 0) std::this_thread::sleep_for(std::chrono::microseconds(200));
        }
      }
    });
  }
  for (std::thread& owner : owners) owner.join();
  for (int count : wrong) CHECK(count == 0);
}

TEST_CASE(
    "INFEMERAL_ISA forces a path; a name that is not there is an error that lists the names") {
  for (const Kernels* kernels : simd::available_kernels()) {
    const ScopedEnv env("INFEMERAL_ISA", kernels->name);
    const auto chosen = simd::choose_kernels();
    REQUIRE(chosen.ok());
    CHECK(*chosen == kernels);
  }
  const ScopedEnv env("INFEMERAL_ISA", "sse9");
  const auto chosen = simd::choose_kernels();
  REQUIRE(chosen.status().code() == absl::StatusCode::kInvalidArgument);
  CHECK(std::string(chosen.status().message()).find("portable") != std::string::npos);
}

}  // namespace infemeral
