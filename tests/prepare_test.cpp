// What engine_prep does to the weights: against the plain model's logits, in float64.
#include "cpu/prepare.h"

#include <bit>
#include <catch2/catch.hpp>
#include <cmath>
#include <functional>
#include <limits>

#include "cpu/narrow.h"
#include "cpu/reference_block.h"
#include "cpu/rotation.h"
#include "engine/float16.h"
#include "tests/prepare_fixture.h"
#include "tests/test_random.h"
#include "tests/tiny_model.h"

namespace infemeral {
namespace {

namespace fs = std::filesystem;

double norm(std::span<const double> x) {
  double squares = 0;
  for (const double value : x) squares += value * value;
  return std::sqrt(squares);
}

double relative_error(std::span<const double> actual, std::span<const double> expected) {
  std::vector<double> difference(expected.begin(), expected.end());
  for (std::size_t i = 0; i < difference.size(); ++i) difference[i] -= actual[i];
  return norm(difference) / norm(expected);
}

// rows x n times an n x n matrix given by its element function.
std::vector<double> times(std::span<const double> x, std::size_t n,
                          const std::function<double(std::size_t, std::size_t)>& m) {
  std::vector<double> y(x.size(), 0);
  for (std::size_t r = 0; r < x.size() / n; ++r) {
    for (std::size_t i = 0; i < n; ++i) {
      for (std::size_t j = 0; j < n; ++j) y[r * n + j] += x[r * n + i] * m(i, j);
    }
  }
  return y;
}

// The logits of a prepared model as a client computes them in float64 from the float16 Q:
//   y' = body(E Q);  y = y' Q^T, or with one step of refinement y += (y' - y Q) Q^T, which brings
//   the float16 rounding of Q out of the result;  logits = lm_head (gain * y).
struct PrivateLogits {
  std::vector<double> plain_uncloak, refined;
};

PrivateLogits private_logits(const ClientFolder& client, const Safetensors& body,
                             const ModelConfig& config, std::span<const std::size_t> ids) {
  const std::size_t h = config.hidden_size;
  const auto cloak = client.load_cloak();
  REQUIRE(cloak.ok());
  const auto q = [&](std::size_t i, std::size_t j) -> double {
    return f16_to_f32(cloak->values()[i * h + j]);
  };
  const auto qt = [&](std::size_t i, std::size_t j) { return q(j, i); };
  const std::vector<double> embed = values_of(client.embed_tokens),
                            head = values_of(client.lm_head);
  std::vector<double> x;
  for (const std::size_t id : ids) {
    x.insert(x.end(), embed.begin() + static_cast<std::ptrdiff_t>(id * h),
             embed.begin() + static_cast<std::ptrdiff_t>((id + 1) * h));
  }
  const auto out = reference_body(config, body, times(x, h, q));
  REQUIRE(out.ok());
  std::vector<double> y = times(*out, h, qt);
  const auto logits = [&](const std::vector<double>& states) {
    const std::vector<double> gain = values_of(client.final_norm);
    std::vector<double> result;
    for (std::size_t r = 0; r < ids.size(); ++r) {
      for (std::size_t v = 0; v < head.size() / h; ++v) {
        double sum = 0;
        for (std::size_t i = 0; i < h; ++i) sum += head[v * h + i] * gain[i] * states[r * h + i];
        result.push_back(sum);
      }
    }
    return result;
  };
  PrivateLogits result;
  result.plain_uncloak = logits(y);
  std::vector<double> residual = times(y, h, q);
  for (std::size_t i = 0; i < residual.size(); ++i) residual[i] = (*out)[i] - residual[i];
  const std::vector<double> correction = times(residual, h, qt);
  for (std::size_t i = 0; i < y.size(); ++i) y[i] += correction[i];
  result.refined = logits(y);
  return result;
}

std::vector<double> plain_logits(const Safetensors& model, const ModelConfig& config, bool tied,
                                 std::span<const std::size_t> ids) {
  const std::size_t h = config.hidden_size;
  const std::vector<double> embed = values_of(*model.find("model.embed_tokens.weight"));
  const std::vector<double> head = tied ? embed : values_of(*model.find("lm_head.weight"));
  std::vector<double> x;
  for (const std::size_t id : ids) {
    x.insert(x.end(), embed.begin() + static_cast<std::ptrdiff_t>(id * h),
             embed.begin() + static_cast<std::ptrdiff_t>((id + 1) * h));
  }
  const auto y = reference_body(config, model, x);
  REQUIRE(y.ok());
  std::vector<double> result;
  for (std::size_t r = 0; r < ids.size(); ++r) {
    for (std::size_t v = 0; v < head.size() / h; ++v) {
      double sum = 0;
      for (std::size_t i = 0; i < h; ++i) sum += head[v * h + i] * (*y)[r * h + i];
      result.push_back(sum);
    }
  }
  return result;
}

}  // namespace

TEST_CASE("narrowing rounds like the formats and counts what they cannot hold") {
  const double inf = std::numeric_limits<double>::infinity();
  const std::vector<double> values = {0, 1, -65504, 65519, 65520, 1e30, 1e300, -inf, 1e-8, 1e-300};
  std::vector<std::byte> out(values.size() * 4);
  NarrowFaults faults = narrow(values, Dtype::kF16, out.data());
  CHECK(faults.count == 4);
  CHECK(faults.largest == inf);
  faults = narrow(std::span(values).first(6), Dtype::kF16, out.data());
  CHECK(faults.count == 2);
  CHECK(faults.largest == 1e30);
  CHECK(narrow(std::span(values).first(6), Dtype::kBF16, out.data()).count == 0);
  CHECK(narrow(values, Dtype::kF32, out.data()).count == 2);
  faults = narrow(std::vector<double>{1e30, std::nan(""), 1e20}, Dtype::kF16, out.data());
  CHECK(faults.count == 3);
  CHECK(std::isnan(faults.largest));
}

TEST_CASE("conversions of rows are those of the formats, bit for bit") {
  // Every binary16, and around every one of them.
  std::vector<std::uint16_t> halves(1 << 16);
  for (std::size_t i = 0; i < halves.size(); ++i) halves[i] = static_cast<std::uint16_t>(i);
  const TensorView tensor{
      .dtype = Dtype::kF16, .shape = {halves.size()}, .data = std::as_bytes(std::span(halves))};
  for (const std::size_t begin :
       {std::size_t{0}, std::size_t{1}, std::size_t{63}, rng()() % 60000}) {
    std::vector<float> expected(halves.size() - begin), actual(expected.size(), 7);
    tensor.read(begin, expected);
    widen(tensor, begin, actual);
    std::size_t different = 0;
    for (std::size_t i = 0; i < actual.size(); ++i) {
      const bool nan = std::isnan(actual[i]) && std::isnan(expected[i]);
      different += !nan && std::bit_cast<std::uint32_t>(actual[i]) !=
                               std::bit_cast<std::uint32_t>(expected[i]);
    }
    CHECK(different == 0);

    std::vector<float> finite;
    for (const float value : expected) {
      if (!(std::fabs(value) <= 65504)) continue;
      finite.push_back(value);
      finite.push_back(value * 1.0002f);  // 65504 becomes 65517, which rounds back
    }
    finite.push_back(std::nextafter(65520.0f, 0.0f));
    std::vector<std::uint16_t> narrowed(finite.size());
    const auto out = std::as_writable_bytes(std::span(narrowed));
    CHECK(narrow(std::span<const float>(finite), Dtype::kF16, out.data()).count == 0);
    different = 0;
    for (std::size_t i = 0; i < finite.size(); ++i)
      different += narrowed[i] != f32_to_f16(finite[i]);
    CHECK(different == 0);

    // One that does not fit, anywhere: the others are as before.
    const std::size_t where = rng()() % finite.size();
    for (const float bad : {65520.0f, -1e30f, std::numeric_limits<float>::infinity(),
                            std::numeric_limits<float>::quiet_NaN()}) {
      std::vector<float> damaged = finite;
      damaged[where] = bad;
      const NarrowFaults faults = narrow(std::span<const float>(damaged), Dtype::kF16, out.data());
      CHECK(faults.count == 1);
      CHECK((faults.largest == std::fabs(bad) || std::isnan(bad)));
      different = 0;
      for (std::size_t i = 0; i < damaged.size(); ++i) {
        different += narrowed[i] != f32_to_f16(damaged[i]);
      }
      CHECK(different == 0);
    }
  }
}

TEST_CASE("the rotation inverts the float16 matrix, not the ideal one") {
  const std::size_t n = 96;
  const auto cloak = Cloak::generate(CloakSeed::random(), n);
  REQUIRE(cloak.ok());
  const auto rotation = Rotation::make(*cloak);
  REQUIRE(rotation.ok());
  // reads: (w Q^-T) (x Q)^T = w x^T
  const std::vector<double> w = normals<double>(5 * n), x = normals<double>(n);
  std::vector<double> folded(w.size(), NAN), rotated(n, NAN);
  rotation->fold_read(5, w, folded);
  rotation->rotate(1, x, rotated);
  for (std::size_t r = 0; r < 5; ++r) {
    double plain = 0, split = 0;
    for (std::size_t i = 0; i < n; ++i) {
      plain += w[r * n + i] * x[i];
      split += folded[r * n + i] * rotated[i];
    }
    CHECK(std::fabs(plain - split) < 1e-11 * norm(w) * norm(x));
  }
  // writes: (Q^T w) a = Q^T (w a)
  const std::vector<double> write = normals<double>(n * 7), a = normals<double>(7);
  std::vector<double> folded_write(write.size(), NAN), wa(n, 0), expected(n, NAN), actual(n, 0);
  rotation->fold_write(7, write, folded_write);
  for (std::size_t i = 0; i < n; ++i) {
    for (std::size_t c = 0; c < 7; ++c) {
      wa[i] += write[i * 7 + c] * a[c];
      actual[i] += folded_write[i * 7 + c] * a[c];
    }
  }
  rotation->rotate(1, wa, expected);
  CHECK(relative_error(actual, expected) < 1e-12);
}

TEST_CASE("the reference: RMSNorm, and Llama 3's RoPE at its ends") {
  const std::vector<double> gain = {1, 2};
  const std::vector<double> normed = reference_rms_norm(std::vector<double>{3, 4, 0, 0}, gain, 0.5);
  CHECK(normed[0] == Approx(3 / std::sqrt(13.0)));
  CHECK(normed[1] == Approx(8 / std::sqrt(13.0)));
  CHECK(normed[2] == 0);
  ModelConfig config;
  config.head_dim = 64;
  config.rope_theta = 500000;
  const std::vector<double> plain = reference_rope_frequencies(config);
  config.rope_scaling = {.llama3 = true,
                         .factor = 8,
                         .low_freq_factor = 1,
                         .high_freq_factor = 4,
                         .original_max_position_embeddings = 8192};
  const std::vector<double> stretched = reference_rope_frequencies(config);
  CHECK(plain[0] == 1);
  CHECK(stretched[0] == 1);
  CHECK(stretched.back() == Approx(plain.back() / 8));
  for (std::size_t i = 0; i < plain.size(); ++i) {
    CHECK(stretched[i] <= plain[i]);
    CHECK(stretched[i] >= plain[i] / 8 * (1 - 1e-12));
  }
}

TEST_CASE("a prepared model computes the plain model's logits, for every architecture") {
  struct Case {
    const char* what;
    TinyModelOptions model;
    Dtype body;
    double tolerance;  // of the logits, relative
  };
  // Body in float32: what remains is float32's rounding in the weights and the norms' argument
  // (about |QQ^T - I|, up to 3e-4 at this size). The plain model is float16, as the client's copy.
  const double exact = 3e-4, f16 = 5e-3, bf16 = 5e-2;
  const Dtype half = Dtype::kF16;
  const std::string window = R"({"sliding_window": 3})";
  const std::string llama3 = R"({"rope_scaling": {"rope_type": "llama3", "factor": 8.0,
      "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}})";
  const Case cases[] = {
      {"llama", {.dtype = half}, Dtype::kF32, exact},
      {"llama, tied", {.tied = true, .dtype = half}, Dtype::kF32, exact},
      {"llama, biases", {.biases = true, .dtype = half}, Dtype::kF32, exact},
      {"llama, stretched RoPE", {.dtype = half, .config_patch = llama3}, Dtype::kF32, exact},
      {"llama, wide heads", {.head_dim = 32, .dtype = half}, Dtype::kF32, exact},
      {"mistral",
       {.model_type = "mistral", .dtype = half, .config_patch = window},
       Dtype::kF32,
       exact},
      {"qwen2", {.model_type = "qwen2", .dtype = half}, Dtype::kF32, exact},
      {"qwen3",
       {.model_type = "qwen3", .biases = true, .dtype = half, .sharded = true},
       Dtype::kF32,
       exact},
      {"float16 body", {.dtype = half}, Dtype::kF16, f16},
      {"bfloat16 body", {.dtype = half}, Dtype::kBF16, bf16},
      {"bfloat16 model", {.dtype = Dtype::kBF16}, Dtype::kF16, f16},
      {"float32 model", {.dtype = Dtype::kF32}, Dtype::kF16, f16},
  };
  for (const Case& c : cases) {
    INFO(c.what);
    const TempFolder temp;
    TinyModelOptions options = c.model;
    options.seed = rng()();
    INFO("seed " << options.seed);
    make_tiny_model(temp.path() / "model", options);
    const auto result = prepare_model({.model_dir = temp.path() / "model",
                                       .output_dir = temp.path() / "out",
                                       .body_dtype = c.body});
    INFO(result.status().ToString());
    REQUIRE(result.ok());
    CHECK(result->tied_embeddings == options.tied);
    CHECK(result->check_error <= result->check_tolerance);

    const auto client = ClientFolder::open(temp.path() / "out" / "client");
    const auto body = Safetensors::open_folder(temp.path() / "out" / "body");
    const auto body_config = load_model_config(temp.path() / "out" / "body");
    const auto model = Safetensors::open_folder(temp.path() / "model");
    const auto config = load_model_config(temp.path() / "model");
    REQUIRE(client.ok());
    REQUIRE(body.ok());
    REQUIRE(body_config.ok());
    std::vector<std::size_t> ids;
    for (int i = 0; i < 6; ++i) ids.push_back(rng()() % options.vocab);
    const double error = relative_error(private_logits(*client, *body, *body_config, ids).refined,
                                        plain_logits(*model, *config, options.tied, ids));
    INFO(error);
    CHECK(error < c.tolerance);
  }
}

TEST_CASE("folding with the exact inverse loses less than folding with Q") {
  // A body folded with Q, as the ideal mathematics has it, next to the prepared one; both read with
  // and without refinement in the client. Errors of the logits, relative to the plain model's.
  const TempFolder temp;
  make_tiny_model(temp.path() / "model", {.layers = 4, .dtype = Dtype::kF16, .seed = rng()()});
  REQUIRE(prepare_model({.model_dir = temp.path() / "model",
                         .output_dir = temp.path() / "out",
                         .body_dtype = Dtype::kF32})
              .ok());
  const auto client = ClientFolder::open(temp.path() / "out" / "client");
  const auto body = Safetensors::open_folder(temp.path() / "out" / "body");
  const auto model = Safetensors::open_folder(temp.path() / "model");
  const auto config = load_model_config(temp.path() / "model");
  REQUIRE((client.ok() && body.ok() && model.ok() && config.ok()));
  const auto cloak = client->load_cloak();
  const std::size_t h = config->hidden_size;

  fs::copy(temp.path() / "out" / "body", temp.path() / "naive");
  edit_model(temp.path() / "naive", [&](const std::string& name, std::vector<float>& values) {
    const bool attention =
        name.find("q_proj") + name.find("k_proj") + name.find("v_proj") != 3 * std::string::npos;
    const bool mlp = name.find("gate_proj") + name.find("up_proj") != 2 * std::string::npos;
    if (!attention && !mlp) return;
    const std::string layer =
        name.substr(0, name.find('.', std::string("model.layers.").size()) + 1);
    const std::vector<double> gain = values_of(*model->find(
        layer + (attention ? "input_layernorm.weight" : "post_attention_layernorm.weight")));
    std::vector<double> w = values_of(*model->find(name));
    for (std::size_t i = 0; i < w.size(); ++i) w[i] *= gain[i % h];
    w = times(w, h, [&](std::size_t i, std::size_t j) {
      return double{f16_to_f32(cloak->values()[i * h + j])};
    });
    std::copy(w.begin(), w.end(), values.begin());
  });
  const auto naive = Safetensors::open_folder(temp.path() / "naive");
  REQUIRE(naive.ok());

  const std::vector<std::size_t> ids = {3, 1, 4, 1, 5, 9, 2, 6};
  const std::vector<double> plain = plain_logits(*model, *config, false, ids);
  const PrivateLogits exact_fold = private_logits(*client, *body, *config, ids);
  const PrivateLogits naive_fold = private_logits(*client, *naive, *config, ids);
  const double best = relative_error(exact_fold.refined, plain);
  const double unrefined = relative_error(exact_fold.plain_uncloak, plain);
  const double worst = relative_error(naive_fold.plain_uncloak, plain);
  const double naive_refined = relative_error(naive_fold.refined, plain);
  WARN("relative error of the logits: exact inverse " << unrefined << ", and refined in the client "
                                                      << best << "; folded with Q " << worst
                                                      << ", and refined " << naive_refined);
  CHECK(best < unrefined);
  CHECK(best < naive_refined);
  CHECK(best < worst);
}

}  // namespace infemeral
