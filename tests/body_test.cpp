// The CPU body against a plain float64 forward pass, and against itself: a row's result must not
// depend on what it is computed together with.
#include "cpu/body.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <numbers>
#include <string>
#include <vector>

#include "cpu/body_weights.h"
#include "cpu/rope.h"
#include "cpu/simd/dispatch.h"
#include "engine/model_config.h"
#include "engine/safetensors.h"
#include "engine/text.h"
#include "tests/page_advice.h"
#include "tests/test_random.h"
#include "tests/tiny_model.h"

namespace infemeral {
namespace {

// ------------------------------------------------------------------- the float64 forward pass

using Row = std::vector<double>;

class Reference {
 public:
  explicit Reference(const std::filesystem::path& folder)
      : config_(load_model_config(folder).value()),
        tensors_(Safetensors::open_folder(folder).value()) {}

  // All rows from position 0; what comes back is normed and times the final gain.
  std::vector<Row> forward(const std::vector<float>& states) const {
    const std::size_t h = config_.hidden_size;
    std::vector<Row> x;
    for (std::size_t i = 0; i < states.size(); i += h) {
      x.emplace_back(states.begin() + static_cast<std::ptrdiff_t>(i),
                     states.begin() + static_cast<std::ptrdiff_t>(i + h));
    }
    for (std::size_t layer = 0; layer < config_.n_layers; ++layer) block(layer, x);
    for (Row& row : x) row = norm(row, "model.norm.weight");
    return x;
  }

 private:
  Row linear(const Row& x, const std::string& name, bool bias) const {
    const TensorView& w = *tensors_.find(name + ".weight");
    Row y(w.shape[0]);
    for (std::size_t i = 0; i < y.size(); ++i) {
      y[i] = bias ? tensors_.find(name + ".bias")->at(i) : 0;
      for (std::size_t j = 0; j < x.size(); ++j) y[i] += x[j] * w.at(i * x.size() + j);
    }
    return y;
  }

  Row norm(const Row& x, const std::string& name) const {
    double squares = 0;
    for (double v : x) squares += v * v;
    const double scale =
        1 / std::sqrt(squares / static_cast<double>(x.size()) + config_.rms_norm_eps);
    Row y(x.size());
    for (std::size_t i = 0; i < x.size(); ++i) y[i] = x[i] * scale * tensors_.find(name)->at(i);
    return y;
  }

  double frequency(std::size_t i) const {
    const double exponent = 2.0 * static_cast<double>(i) / static_cast<double>(config_.head_dim);
    const double plain = 1 / std::pow(config_.rope_theta, exponent);
    const RopeScaling& s = config_.rope_scaling;
    if (!s.llama3) return plain;
    const double wavelength = 2 * std::numbers::pi / plain;
    const double low = s.original_max_position_embeddings / s.low_freq_factor;
    const double high = s.original_max_position_embeddings / s.high_freq_factor;
    if (wavelength < high) return plain;
    if (wavelength > low) return plain / s.factor;
    const double smooth = (s.original_max_position_embeddings / wavelength - s.low_freq_factor) /
                          (s.high_freq_factor - s.low_freq_factor);
    return (1 - smooth) * plain / s.factor + smooth * plain;
  }

  // Heads of a projection, normed (Qwen3) and turned.
  std::vector<Row> heads(const Row& all, std::size_t position, const std::string& gain,
                         bool rotate) const {
    const std::size_t d = config_.head_dim;
    std::vector<Row> result;
    for (std::size_t first = 0; first < all.size(); first += d) {
      Row head(all.begin() + static_cast<std::ptrdiff_t>(first),
               all.begin() + static_cast<std::ptrdiff_t>(first + d));
      if (config_.qk_norm && rotate) head = norm(head, gain);
      Row turned = head;
      for (std::size_t i = 0; rotate && i < d / 2; ++i) {
        const double angle = static_cast<double>(position) * frequency(i);
        turned[i] = head[i] * std::cos(angle) - head[i + d / 2] * std::sin(angle);
        turned[i + d / 2] = head[i + d / 2] * std::cos(angle) + head[i] * std::sin(angle);
      }
      result.push_back(turned);
    }
    return result;
  }

  void block(std::size_t layer, std::vector<Row>& x) const {
    const std::string name = cat("model.layers.", layer, ".");
    const std::string attention = name + "self_attn.", mlp = name + "mlp.";
    std::vector<std::vector<Row>> q, k, v;
    for (std::size_t t = 0; t < x.size(); ++t) {
      const Row y = norm(x[t], name + "input_layernorm.weight");
      q.push_back(heads(linear(y, attention + "q_proj", config_.qkv_bias), t,
                        attention + "q_norm.weight", true));
      k.push_back(heads(linear(y, attention + "k_proj", config_.qkv_bias), t,
                        attention + "k_norm.weight", true));
      v.push_back(heads(linear(y, attention + "v_proj", config_.qkv_bias), t, "", false));
    }
    const bool windowed = config_.sliding_window > 0 && layer >= config_.sliding_from_layer;
    for (std::size_t t = 0; t < x.size(); ++t) {
      Row mixed;
      for (std::size_t head = 0; head < config_.n_heads; ++head) {
        const std::size_t shared = head / (config_.n_heads / config_.n_kv_heads);
        Row weights;
        double total = 0;
        for (std::size_t s = 0; s <= t; ++s) {
          double score = 0;
          for (std::size_t i = 0; i < config_.head_dim; ++i) {
            score += q[t][head][i] * k[s][shared][i];
          }
          const bool seen = !windowed || s + config_.sliding_window > t;
          weights.push_back(
              seen ? std::exp(score / std::sqrt(static_cast<double>(config_.head_dim))) : 0);
          total += weights.back();
        }
        for (std::size_t i = 0; i < config_.head_dim; ++i) {
          double sum = 0;
          for (std::size_t s = 0; s <= t; ++s) sum += weights[s] / total * v[s][shared][i];
          mixed.push_back(sum);
        }
      }
      const Row added = linear(mixed, attention + "o_proj", config_.o_bias);
      for (std::size_t i = 0; i < added.size(); ++i) x[t][i] += added[i];
    }
    for (Row& row : x) {
      const Row y = norm(row, name + "post_attention_layernorm.weight");
      Row gate = linear(y, mlp + "gate_proj", config_.mlp_bias);
      const Row up = linear(y, mlp + "up_proj", config_.mlp_bias);
      for (std::size_t i = 0; i < gate.size(); ++i) gate[i] *= up[i] / (1 + std::exp(-gate[i]));
      const Row added = linear(gate, mlp + "down_proj", config_.mlp_bias);
      for (std::size_t i = 0; i < added.size(); ++i) row[i] += added[i];
    }
  }

  ModelConfig config_;
  Safetensors tensors_;
};

// --------------------------------------------------------------------------------------- helpers

// One step; what comes back has the size of what was wanted and was poisoned before.
std::vector<float> step(Body& body, BodySession& session, std::uint32_t start,
                        std::span<const float> states, Wanted wanted = Wanted::kAll) {
  const std::size_t h = body.info().hidden_size;
  const auto rows = static_cast<std::uint32_t>(states.size() / h);
  const std::size_t out_rows = wanted == Wanted::kAll ? rows : wanted == Wanted::kLast ? 1 : 0;
  std::vector<float> out(out_rows * h, std::numeric_limits<float>::quiet_NaN());
  BodyStep one{.session = &session,
               .start_pos = start,
               .rows = rows,
               .states = states,
               .wanted = wanted,
               .out = out};
  body.run({&one, 1});
  INFO(one.status.message());
  REQUIRE(one.status.ok());
  REQUIRE(session.kv_len() == start + rows);
  return out;
}

bool same_bits(std::span<const float> a, std::span<const float> b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size_bytes()) == 0);
}

class Model {
 public:
  explicit Model(const TinyModelOptions& options) : path(folder_.path() / "model") {
    make_tiny_model(path, options);
  }
  std::unique_ptr<Body> load(const CpuBodyOptions& options = {}) const {
    auto body = load_cpu_body(path, options);
    INFO(body.status().message());
    REQUIRE(body.ok());
    return *std::move(body);
  }

 private:
  TempFolder folder_;

 public:
  std::filesystem::path path;
};

class ScopedEnv {
 public:
  ScopedEnv(const char* name, const char* value) : name_(name) { setenv(name, value, 1); }
  ~ScopedEnv() { unsetenv(name_); }

 private:
  const char* name_;
};

TinyModelOptions fresh(TinyModelOptions options) {
  options.seed = rng()();
  return options;
}

const char* const kLlama3Scaling =
    R"({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64}})";

std::vector<TinyModelOptions> architectures() {
  return {
      {.model_type = "llama"},
      {.model_type = "llama", .biases = true, .config_patch = kLlama3Scaling},
      {.model_type = "llama",
       .hidden = 63,
       .heads = 3,
       .kv_heads = 3,
       .head_dim = 10,
       .intermediate = 101},
      {.model_type = "mistral", .config_patch = R"({"sliding_window": 7})"},
      {.model_type = "qwen2", .heads = 6, .kv_heads = 1},
      {.model_type = "qwen2",
       .config_patch =
           R"({"use_sliding_window": true, "sliding_window": 5, "max_window_layers": 1})"},
      {.model_type = "qwen3", .head_dim = 24, .sharded = true},
  };
}

}  // namespace

TEST_CASE("every architecture equals the float64 forward pass, on every kernel path") {
  for (const simd::Kernels* kernels : simd::available_kernels()) {
    const ScopedEnv env("INFEMERAL_ISA", kernels->name);
    for (const TinyModelOptions& options : architectures()) {
      for (Dtype dtype : {Dtype::kF32, Dtype::kF16, Dtype::kBF16}) {
        TinyModelOptions o = fresh(options);
        o.dtype = dtype;
        CAPTURE(kernels->name, o.model_type, o.config_patch, o.head_dim, dtype_name(dtype).data(),
                o.seed);
        const Model model(o);
        const auto body = model.load();
        const auto session = body->new_session().value();
        const std::size_t rows = 29;
        const std::vector<float> states = normals(rows * o.hidden);
        const std::vector<float> out = step(*body, *session, 0, states);
        const std::vector<Row> expected = Reference(model.path).forward(states);
        // In float32 each of the few hundred operations between input and output adds about one
        // rounding of the norm; an f16 cache rounds keys and values once, to 11 bits, which moves
        // scores of size ~10 and sums alike.
        const double tolerance = dtype == Dtype::kF32 ? 500 * 0x1p-24 : 30 * 0x1p-11;
        for (std::size_t i = 0; i < rows; ++i) {
          double error = 0, size = 0;
          for (std::size_t j = 0; j < o.hidden; ++j) {
            error += std::pow(out[i * o.hidden + j] - expected[i][j], 2);
            size += std::pow(expected[i][j], 2);
          }
          REQUIRE(std::sqrt(error) <= tolerance * std::sqrt(size));
        }
      }
    }
  }
}

TEST_CASE("prefill in one piece, in chunks, and row by row give the same bits") {
  for (const simd::Kernels* kernels : simd::available_kernels()) {
    const ScopedEnv env("INFEMERAL_ISA", kernels->name);
    for (const TinyModelOptions& options : architectures()) {
      TinyModelOptions o = fresh(options);
      o.dtype = rng()() % 2 == 0 ? Dtype::kF16 : Dtype::kF32;
      o.max_context = 700;
      CAPTURE(kernels->name, o.model_type, o.config_patch, o.seed);
      const Model model(o);
      const auto body = model.load();
      const std::size_t h = o.hidden, rows = 531;  // three batches, three pages
      const std::vector<float> states = normals(rows * h);
      const auto whole = body->new_session().value();
      const std::vector<float> expected = step(*body, *whole, 0, states);

      const auto chunked = body->new_session().value();
      for (std::size_t at = 0; at < rows;) {
        const std::size_t count = std::min<std::size_t>(rows - at, 1 + rng()() % 200);
        const std::vector<float> out = step(*body, *chunked, static_cast<std::uint32_t>(at),
                                            std::span(states).subspan(at * h, count * h));
        REQUIRE(same_bits(out, std::span(expected).subspan(at * h, count * h)));
        at += count;
      }
      const auto single = body->new_session().value();
      for (std::size_t at = 0; at < rows; ++at) {
        const std::vector<float> out = step(*body, *single, static_cast<std::uint32_t>(at),
                                            std::span(states).subspan(at * h, h), Wanted::kLast);
        REQUIRE(same_bits(out, std::span(expected).subspan(at * h, h)));
      }
    }
  }
}

TEST_CASE("a step sent again, and one that cuts the cache, change nothing") {
  const TinyModelOptions o = fresh({.model_type = "llama", .dtype = Dtype::kF16});
  const Model model(o);
  const auto body = model.load();
  const std::size_t h = o.hidden;
  const std::vector<float> states = normals(60 * h), other = normals(30 * h);
  const std::span<const float> all(states);
  const auto session = body->new_session().value();
  const std::vector<float> first = step(*body, *session, 0, all.first(40 * h));
  const std::vector<float> next = step(*body, *session, 40, all.subspan(40 * h, h));
  CHECK(same_bits(step(*body, *session, 40, all.subspan(40 * h, h)), next));
  // A wrong guess, rolled back.
  step(*body, *session, 20, other);
  CHECK(session->kv_len() == 50);
  CHECK(same_bits(step(*body, *session, 20, all.subspan(20 * h, 20 * h)),
                  std::span(first).subspan(20 * h)));
  CHECK(same_bits(step(*body, *session, 40, all.subspan(40 * h, h)), next));
}

TEST_CASE("what is wanted changes what comes back, not what it is") {
  const TinyModelOptions o = fresh({.model_type = "qwen2", .max_context = 600});
  const Model model(o);
  const auto body = model.load();
  const std::size_t h = o.hidden, rows = 300;
  const std::vector<float> states = normals(rows * h), more = normals(h);
  const auto all = body->new_session().value(), last = body->new_session().value(),
             none = body->new_session().value();
  const std::vector<float> expected = step(*body, *all, 0, states);
  CHECK(same_bits(step(*body, *last, 0, states, Wanted::kLast),
                  std::span(expected).subspan((rows - 1) * h)));
  step(*body, *none, 0, states, Wanted::kNone);
  const std::vector<float> after = step(*body, *all, rows, more);
  CHECK(same_bits(step(*body, *last, rows, more), after));
  CHECK(same_bits(step(*body, *none, rows, more), after));
}

TEST_CASE("several sessions in one run give each the bits that it gets alone") {
  for (const TinyModelOptions& options : architectures()) {
    TinyModelOptions o = fresh(options);
    o.max_context = 1000;
    CAPTURE(o.model_type, o.config_patch, o.seed);
    const Model model(o);
    const std::size_t h = o.hidden;
    // Decodes, long and short prefills, in an order of their own each time.
    std::vector<std::size_t> history = {3, 0, 270, 17, 0, 1, 40}, rows = {1, 300, 1, 12, 1, 1, 55};
    std::shuffle(rows.begin(), rows.end(), rng());
    const auto body = model.load({.threads = 2}), other = model.load({.threads = 1});
    std::vector<std::unique_ptr<BodySession>> sessions;
    std::vector<std::vector<float>> states, outs, expected;
    std::vector<BodyStep> steps;
    for (std::size_t i = 0; i < rows.size(); ++i) {
      const std::vector<float> past = normals(history[i] * h);
      states.push_back(normals(rows[i] * h));
      const Wanted wanted = i == 2 ? Wanted::kNone : i == 3 ? Wanted::kLast : Wanted::kAll;
      const auto start = static_cast<std::uint32_t>(history[i]);
      // Alone, on another number of threads.
      const auto alone = other->new_session().value();
      sessions.push_back(body->new_session().value());
      if (start > 0) {
        step(*other, *alone, 0, past, Wanted::kNone);
        step(*body, *sessions.back(), 0, past, Wanted::kNone);
      }
      expected.push_back(step(*other, *alone, start, states.back(), wanted));
      outs.emplace_back(expected.back().size(), std::numeric_limits<float>::quiet_NaN());
      steps.push_back({.session = sessions.back().get(),
                       .start_pos = start,
                       .rows = static_cast<std::uint32_t>(rows[i]),
                       .wanted = wanted});
    }
    for (std::size_t i = 0; i < steps.size(); ++i) {
      steps[i].states = states[i];
      steps[i].out = outs[i];
    }
    body->run(steps);
    for (std::size_t i = 0; i < steps.size(); ++i) {
      REQUIRE(steps[i].status.ok());
      CHECK(same_bits(outs[i], expected[i]));
    }
  }
}

TEST_CASE("steps that do not fit are refused one by one, and leave the others alone") {
  const TinyModelOptions o = fresh({.max_context = 100});
  const Model model(o), stranger_model(o);
  const auto body = model.load({.threads = 0, .max_context = 50}), stranger = stranger_model.load();
  CHECK(body->info().max_context == 50);
  const std::size_t h = o.hidden;
  const std::vector<float> states = normals(60 * h);
  std::vector<float> out(60 * h);
  const auto session = body->new_session().value(), busy = body->new_session().value(),
             foreign = stranger->new_session().value();
  const std::span<const float> in(states);
  const std::span<float> to(out);
  const auto refused = [&](BodyStep bad, const char* words) {
    std::vector<float> good_out(h);
    BodyStep steps[] = {
        bad, {.session = busy.get(), .rows = 2, .states = in.first(2 * h), .out = good_out}};
    body->run(steps);
    CHECK(steps[0].status.code() == absl::StatusCode::kInvalidArgument);
    INFO(steps[0].status.message());
    CHECK(std::string(steps[0].status.message()).find(words) != std::string::npos);
    CHECK(steps[1].status.ok());
    CHECK(busy->kv_len() == 2);
    CHECK(session->kv_len() == 0);
  };
  refused({.session = session.get(),
           .start_pos = 1,
           .rows = 1,
           .states = in.first(h),
           .out = to.first(h)},
          "starts at position 1");
  refused({.session = session.get(), .rows = 51, .states = in.first(51 * h), .out = to.first(h)},
          "beyond the context of 50");
  refused({.session = session.get(),
           .start_pos = 0xffffffffu,
           .rows = 1,
           .states = in.first(h),
           .out = to.first(h)},
          "starts at position");
  refused({.session = session.get(), .rows = 0}, "at least one row");
  refused({.session = session.get(), .rows = 2, .states = in.first(h), .out = to.first(h)},
          "room for");
  refused({.session = session.get(), .rows = 1, .states = in.first(h), .out = to.first(2 * h)},
          "room for");
  refused({.session = nullptr, .rows = 1, .states = in.first(h), .out = to.first(h)}, "not made");
  refused({.session = foreign.get(), .rows = 1, .states = in.first(h), .out = to.first(h)},
          "not made");
  std::vector<float> broken = normals(h);
  broken[h / 2] = std::numeric_limits<float>::infinity();
  refused({.session = session.get(), .rows = 1, .states = broken, .out = to.first(h)},
          "not finite");

  BodyStep twice[] = {
      {.session = busy.get(), .rows = 1, .states = in.first(h), .out = to.first(h)},
      {.session = busy.get(), .rows = 1, .states = in.first(h), .out = to.first(h)}};
  body->run(twice);
  CHECK(twice[0].status.ok());
  CHECK(twice[1].status.code() == absl::StatusCode::kInvalidArgument);
}

TEST_CASE("the cache grows in pages and counts its bytes") {
  for (Dtype dtype : {Dtype::kF32, Dtype::kF16}) {
    TinyModelOptions o = fresh({.max_context = 600});
    o.dtype = dtype;
    const Model model(o);
    const auto body = model.load();
    const std::size_t per_token =
        o.layers * 2 * o.kv_heads * o.head_dim * (dtype == Dtype::kF32 ? 4 : 2);
    CHECK(body->info().kv_bytes_per_token == per_token);
    const auto session = body->new_session().value();
    CHECK(session->kv_bytes() == 0);
    const std::vector<float> states = normals(256 * o.hidden);
    step(*body, *session, 0, states, Wanted::kNone);
    CHECK(session->kv_bytes() == 256 * per_token);
    step(*body, *session, 256, std::span(states).first(o.hidden), Wanted::kNone);
    CHECK(session->kv_bytes() == 512 * per_token);
  }
}

TEST_CASE("weights are read in huge pages where the system has them") {
  const Model model(fresh({}));
  const auto weights = BodyWeights::load(model.path);
  REQUIRE(weights.ok());
  for (const LayerWeights& layer : weights->layers) {
    for (const LinearWeights* w :
         {&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down}) {
      CHECK(asked_for_huge_pages(w->weight.data) == has_huge_pages());
    }
  }
}

TEST_CASE("the folder says what it is, or what is wrong with it") {
  const TinyModelOptions o = fresh({.dtype = Dtype::kBF16});
  const Model model(o);
  CHECK(model.load()->info().description == "llama 2 layers bf16");
  CHECK(model.load()->info().model_fingerprint == Fingerprint{});
  const auto error = [&](const CpuBodyOptions& options = {}) {
    const auto body = load_cpu_body(model.path, options);
    REQUIRE(!body.ok());
    return body.status();
  };
  CHECK(error({.threads = 0, .max_context = 257}).code() == absl::StatusCode::kInvalidArgument);
  {
    const ScopedEnv env("INFEMERAL_ISA", "abacus");
    CHECK(error().code() == absl::StatusCode::kInvalidArgument);
  }

  const std::string hex(64, 'a');
  const auto manifest = [&](const std::string& text) {
    std::ofstream(model.path / "infemeral.json") << text;
  };
  const std::string prints =
      cat(R"("model_fingerprint": ")", hex, R"(", "cloak_commitment": ")", hex, "\"}");
  for (const char* version : {"0", "3", "\"1\"", "null"}) {
    manifest(cat(R"({"format_version": )", version, ", ", prints));
    CHECK(error().code() == absl::StatusCode::kDataLoss);
  }
  manifest(cat(R"({"format_version": 1, )", prints));
  CHECK(model.load()->info().cloak_commitment[31] == 0xaa);
  for (const char* bad :
       {"", "[]", "{}",
        R"({"format_version": 1, "model_fingerprint": 7, "cloak_commitment": "aa"})"}) {
    manifest(bad);
    CHECK(error().code() == absl::StatusCode::kDataLoss);
  }
  std::filesystem::remove(model.path / "infemeral.json");

  std::filesystem::remove(model.path / "model.safetensors");
  CHECK(error().code() == absl::StatusCode::kNotFound);
  const TempFolder wrong;
  make_tiny_model(wrong.path() / "model", fresh({.intermediate = 97}));
  std::filesystem::copy(wrong.path() / "model" / "model.safetensors", model.path);
  const absl::Status shapes = error();
  CHECK(shapes.code() == absl::StatusCode::kInvalidArgument);
  CHECK(std::string(shapes.message()).find("mlp.") != std::string::npos);
}

TEST_CASE("Llama 3's scaling keeps short wavelengths and stretches long ones") {
  ModelConfig config;
  config.head_dim = 128;
  config.rope_theta = 500000;
  const RopeTable plain(config);
  config.rope_scaling = {.llama3 = true,
                         .factor = 8,
                         .low_freq_factor = 1,
                         .high_freq_factor = 4,
                         .original_max_position_embeddings = 8192};
  const RopeTable scaled(config);
  CHECK(scaled.frequencies().front() == plain.frequencies().front());
  CHECK(scaled.frequencies().back() == Approx(plain.frequencies().back() / 8));
  // Pair 32 of 64: wavelength 4443, between 8192/4 and 8192; blended.
  const double smooth = (8192 * plain.frequencies()[32] / (2 * std::numbers::pi) - 1) / 3;
  const double blend = (1 - smooth) / 8 + smooth;
  CHECK(scaled.frequencies()[32] == Approx(plain.frequencies()[32] * blend));
}

}  // namespace infemeral
