// A body of int8 weights against the float64 forward pass on the weights that its integers and
// scales stand for, and what engine_prep makes of a model against its own float32 body.
#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "cpu/body.h"
#include "cpu/int8_weights.h"
#include "cpu/prepare.h"
#include "cpu/reference_block.h"
#include "cpu/simd/dispatch.h"
#include "engine/model_config.h"
#include "tests/tiny_model.h"

namespace infemeral {
namespace {

namespace fs = std::filesystem;

std::mt19937_64& rng() {
  static std::mt19937_64 generator{std::random_device{}()};
  return generator;
}

bool is_matrix(const std::string& name, const TensorView& tensor) {
  return name.starts_with("model.layers.") && tensor.shape.size() == 2;
}

struct Stored {
  SafetensorsWriter::Declaration declaration;
  std::vector<std::byte> bytes;
};

template <typename T>
std::vector<std::byte> bytes_of(const std::vector<T>& values) {
  const auto* begin = reinterpret_cast<const std::byte*>(values.data());
  return {begin, begin + values.size() * sizeof(T)};
}

void save(const fs::path& folder, const std::vector<Stored>& tensors) {
  std::vector<SafetensorsWriter::Declaration> declarations;
  for (const Stored& t : tensors) declarations.push_back(t.declaration);
  auto writer = SafetensorsWriter::create(folder / "model.safetensors", declarations, {});
  REQUIRE(writer.ok());
  for (const Stored& t : tensors) REQUIRE((*writer)->write(t.bytes).ok());
  REQUIRE((*writer)->finish().ok());
}

// A model whose matrices are random integers and scales, and the same in float32.
struct Twins {
  explicit Twins(const TinyModelOptions& options)
      : int8(temp.path() / "int8"), plain(temp.path() / "plain") {
    make_tiny_model(temp.path() / "model", options);
    const auto model = Safetensors::open_folder(temp.path() / "model");
    REQUIRE(model.ok());
    for (const fs::path& folder : {int8, plain}) {
      fs::create_directory(folder);
      fs::copy_file(temp.path() / "model" / "config.json", folder / "config.json");
    }
    std::vector<Stored> integers, wide;  // wider dtypes lie first in a file
    std::vector<Stored> plain_tensors;
    for (const auto& [name, tensor] : model->tensors()) {
      std::vector<float> values(tensor.elements());
      tensor.read(0, values);
      if (!is_matrix(name, tensor)) {
        wide.push_back({{name, Dtype::kF32, tensor.shape}, bytes_of(values)});
        plain_tensors.push_back(wide.back());
        continue;
      }
      const std::size_t rows = tensor.shape[0], cols = tensor.shape[1];
      std::vector<float> scales(rows);
      std::vector<std::int8_t> q(rows * cols);
      for (std::size_t r = 0; r < rows; ++r) {
        scales[r] = (0.5f + static_cast<float>(rng()() % 1000) * 1e-3f) /
                    (127 * std::sqrt(static_cast<float>(cols)));
        for (std::size_t i = 0; i < cols; ++i) {
          const std::size_t at = r * cols + i;
          q[at] = static_cast<std::int8_t>(static_cast<int>(rng()() % 255) - 127);
          values[at] = scales[r] * static_cast<float>(q[at]);
        }
      }
      integers.push_back({{name, Dtype::kI8, tensor.shape}, bytes_of(q)});
      wide.push_back({{name + "_scale", Dtype::kF32, {rows}}, bytes_of(scales)});
      plain_tensors.push_back({{name, Dtype::kF32, tensor.shape}, bytes_of(values)});
    }
    wide.insert(wide.end(), integers.begin(), integers.end());
    tensors = wide;
    save(int8, wide);
    save(plain, plain_tensors);
  }

  TempFolder temp;
  fs::path int8, plain;
  std::vector<Stored> tensors;  // of the int8 one
};

class ScopedEnv {
 public:
  ScopedEnv(const char* name, const char* value) : name_(name) { setenv(name, value, 1); }
  ~ScopedEnv() { unsetenv(name_); }

 private:
  const char* name_;
};

double relative_error(std::span<const float> a, std::span<const double> b) {
  double error = 0, size = 0;
  for (std::size_t i = 0; i < b.size(); ++i) {
    error += std::pow(a[i] - b[i], 2);
    size += b[i] * b[i];
  }
  return std::sqrt(error / size);
}

}  // namespace

TEST_CASE(
    "an int8 body equals the float64 forward pass on every kernel path, alone or in a batch") {
  const TinyModelOptions shapes[] = {
      {.model_type = "llama", .dtype = Dtype::kF32},
      {.model_type = "qwen2", .hidden = 63, .heads = 6, .kv_heads = 1, .dtype = Dtype::kF32},
      {.model_type = "qwen3", .head_dim = 24, .intermediate = 101, .dtype = Dtype::kF32},
  };
  for (TinyModelOptions options : shapes) {
    options.seed = rng()();
    const Twins twins(options);
    const auto config = load_model_config(twins.plain);
    const auto plain = Safetensors::open_folder(twins.plain);
    REQUIRE((config.ok() && plain.ok()));
    const std::size_t rows = 29, h = config->hidden_size;
    std::normal_distribution<float> normal;
    std::vector<float> states(rows * h);
    for (float& x : states) x = normal(rng());
    const auto expected = reference_body(*config, *plain, {states.begin(), states.end()});
    REQUIRE(expected.ok());
    for (const simd::Kernels* kernels : simd::available_kernels()) {
      CAPTURE(kernels->name, options.model_type, options.seed);
      const ScopedEnv env("INFEMERAL_ISA", kernels->name);
      const auto body = load_cpu_body(twins.int8, {});
      INFO(body.status().ToString());
      REQUIRE(body.ok());
      CHECK((*body)->info().description.ends_with(" i8"));
      const auto run = [&](BodySession& session, std::uint32_t start, std::uint32_t count) {
        std::vector<float> out(count * h, std::numeric_limits<float>::quiet_NaN());
        BodyStep step{.session = &session,
                      .start_pos = start,
                      .rows = count,
                      .states = std::span(states).subspan(start * h, count * h),
                      .wanted = Wanted::kAll,
                      .out = out};
        (*body)->run({&step, 1});
        REQUIRE(step.status.ok());
        return out;
      };
      const auto session = (*body)->new_session().value();
      const std::vector<float> out = run(*session, 0, rows);
      // The cache is f16, as in body_test.
      CHECK(relative_error(out, *expected) <= 30 * 0x1p-11);
      const auto other = (*body)->new_session().value();
      for (std::uint32_t row = 0; row < rows; ++row) {
        const std::vector<float> one = run(*other, row, 1);
        REQUIRE(std::memcmp(one.data(), &out[row * h], h * sizeof(float)) == 0);
      }
    }
  }
}

TEST_CASE("an int8 body without its scales, or with scales that are none, is refused by name") {
  const Twins twins({.dtype = Dtype::kF32, .seed = rng()()});
  const auto error = [&](std::vector<Stored> tensors) {
    save(twins.int8, tensors);
    return load_cpu_body(twins.int8, {}).status();
  };
  fs::remove(twins.int8 / "model.safetensors");
  const std::string name = "model.layers.0.mlp.up_proj.weight_scale";
  std::vector<Stored> missing;
  for (const Stored& t : twins.tensors) {
    if (t.declaration.name != name) missing.push_back(t);
  }
  REQUIRE(missing.size() + 1 == twins.tensors.size());
  CHECK(std::string(error(missing).message()).find(name) != std::string::npos);
  for (const float bad :
       {-1.0f, std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    std::vector<Stored> tensors = twins.tensors;
    for (Stored& t : tensors) {
      if (t.declaration.name == name) std::memcpy(t.bytes.data() + 4, &bad, 4);
    }
    fs::remove(twins.int8 / "model.safetensors");
    const absl::Status status = error(tensors);
    CHECK(status.code() == absl::StatusCode::kDataLoss);
    CHECK(std::string(status.message()).find(name) != std::string::npos);
  }
}

TEST_CASE("engine_prep's int8 weights are the float32 body's, each to half a step of its row") {
  const TempFolder temp;
  make_tiny_model(temp.path() / "model", {.biases = true, .dtype = Dtype::kF16, .seed = rng()()});
  const CloakSeed seed = CloakSeed::random();
  for (const auto& [name, dtype] : {std::pair{"f32", Dtype::kF32}, std::pair{"i8", Dtype::kI8}}) {
    const auto prepared = prepare_model({.model_dir = temp.path() / "model",
                                         .output_dir = temp.path() / name,
                                         .body_dtype = dtype,
                                         .seed = &seed,
                                         .max_shard_bytes = 20'000});
    INFO(prepared.status().ToString());
    REQUIRE(prepared.ok());
  }
  const auto exact = Safetensors::open_folder(temp.path() / "f32" / "body");
  const auto int8 = Safetensors::open_folder(temp.path() / "i8" / "body");
  REQUIRE((exact.ok() && int8.ok()));
  const auto model_config = load_model_config(temp.path() / "model");
  REQUIRE(model_config.ok());
  std::size_t matrices = 0;
  for (const auto& [name, tensor] : exact->tensors()) {
    const TensorView* stored = int8->find(name);
    REQUIRE(stored != nullptr);
    REQUIRE(stored->shape == tensor.shape);
    if (!is_matrix(name, tensor)) {
      CHECK(stored->dtype == Dtype::kF32);
      CHECK(std::memcmp(stored->data.data(), tensor.data.data(), tensor.data.size()) == 0);
      continue;
    }
    ++matrices;
    REQUIRE(stored->dtype == Dtype::kI8);
    const TensorView* scales = int8->find(name + "_scale");
    REQUIRE(scales != nullptr);
    const std::size_t rows = tensor.shape[0], cols = tensor.shape[1];
    // The integers are made from products in float32, the other body from float64 ones: H terms
    // and four roundings apart, of |w| |q| (Cauchy), where the cloak keeps |w| and |q| is 1. A row
    // is folded where it is read, a column where it is written.
    std::vector<double> row_norms(rows), column_norms(cols);
    for (std::size_t i = 0; i < tensor.elements(); ++i) {
      row_norms[i / cols] += std::pow(tensor.at(i), 2);
      column_norms[i % cols] += std::pow(tensor.at(i), 2);
    }
    const double hidden = static_cast<double>(model_config->hidden_size);
    for (std::size_t i = 0; i < tensor.elements(); ++i) {
      const double fold = std::sqrt(std::max(row_norms[i / cols], column_norms[i % cols])) *
                          (hidden + 4) * 0x1p-24 * 1.001;
      const double scale = scales->at(i / cols), q = stored->at(i);
      REQUIRE(std::fabs(q) <= 127);
      REQUIRE(std::fabs(tensor.at(i) - scale * q) <= scale * (0.5 + 127 * 0x1p-23) + fold);
    }
  }
  CHECK(matrices == 7 * model_config->n_layers);

  nlohmann::json config, manifest;
  std::ifstream(temp.path() / "i8" / "body" / "config.json") >> config;
  std::ifstream(temp.path() / "i8" / "body" / "infemeral.json") >> manifest;
  CHECK(config["quantization_config"]["quant_method"] == "infemeral_int8");
  CHECK(manifest["format_version"] == 2);
  CHECK(manifest["body_dtype"] == "I8");
  CHECK(load_cpu_body(temp.path() / "i8" / "body", {}).ok());

  // Anyone else's quantisation is still refused.
  config["quantization_config"]["quant_method"] = "gptq";
  std::ofstream(temp.path() / "i8" / "body" / "config.json") << config.dump();
  CHECK(load_cpu_body(temp.path() / "i8" / "body", {}).status().code() ==
        absl::StatusCode::kUnimplemented);
}

TEST_CASE("a row of zeros, and one of the smallest numbers, quantise to themselves or zeros") {
  std::int8_t q[3] = {99, 99, 99};
  CHECK(quantise_weights(std::vector<float>{0, 0, 0}, q) == 0);
  CHECK((q[0] == 0 && q[1] == 0 && q[2] == 0));
  const float tiny = std::numeric_limits<float>::denorm_min();
  const float scale = quantise_weights(std::vector<float>{tiny, -tiny, 0}, q);
  CHECK(scale * static_cast<float>(q[0]) <= tiny);
  CHECK(q[2] == 0);
  const float largest = std::numeric_limits<float>::max();
  CHECK(std::isfinite(quantise_weights(std::vector<float>{largest, -largest, 1}, q)));
  CHECK((q[0] == 127 && q[1] == -127 && q[2] == 0));
}

}  // namespace infemeral
