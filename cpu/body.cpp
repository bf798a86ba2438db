#include "cpu/body.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "cpu/aligned.h"
#include "cpu/attention.h"
#include "cpu/body_weights.h"
#include "cpu/guard.h"
#include "cpu/kv_cache.h"
#include "cpu/linear.h"
#include "cpu/parallel.h"
#include "cpu/rope.h"
#include "cpu/simd/dispatch.h"
#include "engine/fingerprint.h"
#include "engine/json_file.h"
#include "engine/text.h"

namespace infemeral {
namespace {

// Rows that pass through the layers together: enough for the products to run from cache, few
// enough for the buffers of a wide MLP to stay below 50 MiB.
constexpr std::size_t kBatchRows = 256;

// One layer's worth of elementwise work that is worth another thread, in elements.
constexpr std::size_t kElementwiseGrain = 1 << 14;

class CpuBody final : public Body {
 public:
  CpuBody(BodyWeights weights, BodyInfo info, const simd::Kernels& kernels, int threads)
      : weights_(std::move(weights)),
        config_(weights_.config),
        info_(std::move(info)),
        kernels_(kernels),
        pool_(threads),
        rope_(config_),
        attention_(config_, kernels, pool_) {}

  static KvShape kv_shape(const BodyWeights& weights) {
    // An f32 body is the exact one. The others' weights are rounded to 11 or 8 bits, so a cache of
    // 11 bits costs them nothing that shows, and halves what attention reads.
    return {.layers = weights.config.n_layers,
            .heads = weights.config.n_kv_heads,
            .head_dim = weights.config.head_dim,
            .format = weights.dtype == Dtype::kF32 ? simd::Format::kF32 : simd::Format::kF16};
  }

  const BodyInfo& info() const override { return info_; }

  absl::StatusOr<std::unique_ptr<BodySession>> new_session() override {
    return std::make_unique<KvCache>(kv_shape(weights_), this);
  }

  void run(std::span<BodyStep> steps) override;

 private:
  // Rows of one step that are in the batch.
  struct Part {
    BodyStep* step = nullptr;
    std::size_t first = 0;  // in the step
    Segment segment;
  };

  absl::Status prepare(const BodyStep& step, std::span<const BodyStep> earlier);
  void run_steps(std::span<BodyStep> steps);
  void run_batch();
  void keep_wanted_rows();
  void norm(const Rows& x, const std::vector<float>& gain, const Rows& out);
  void add_and_norm(const Rows& delta, const std::vector<float>& gain);
  void place_keys_and_values(std::size_t layer, const LayerWeights& w);
  void multiply(std::initializer_list<Linear> products, const Rows& x);
  void mlp(const LayerWeights& w);
  void plan_attention();
  void for_rows(std::size_t row_elements, absl::FunctionRef<void(std::size_t)> body);

  static Rows rows(AlignedFloats& buffer, std::size_t count, std::size_t width) {
    if (buffer.size() < count * width) buffer.resize(count * width);
    return {buffer.data(), width};
  }
  Rows columns(const Rows& rows, std::size_t first) const {
    return {rows.data + first, rows.stride};
  }

  BodyWeights weights_;
  const ModelConfig& config_;
  BodyInfo info_;
  const simd::Kernels& kernels_;
  ThreadPool pool_;
  RopeTable rope_;
  Attention attention_;

  // The batch that is passing through.
  std::vector<Part> parts_;
  std::size_t m_ = 0;  // rows
  Rows x_;             // m x H, the residual stream
  Rows hidden_;        // m x H, normed, or what a layer adds
  Rows qkv_;           // m x (n_heads + 2 n_kv_heads) * head_dim
  Rows heads_;         // m x n_heads * head_dim
  Rows gate_, up_;     // m x intermediate
  AlignedFloats x_buffer_, hidden_buffer_, qkv_buffer_, heads_buffer_, gate_buffer_, up_buffer_;
  std::vector<Segment> segments_;
};

absl::Status CpuBody::prepare(const BodyStep& step, std::span<const BodyStep> earlier) {
  auto* cache = dynamic_cast<KvCache*>(step.session);
  if (cache == nullptr || cache->owner() != this) {
    return absl::InvalidArgumentError("the step's session was not made by this body");
  }
  if (std::any_of(earlier.begin(), earlier.end(),
                  [&](const BodyStep& s) { return s.session == step.session; })) {
    return absl::InvalidArgumentError("the same session has two steps in one run");
  }
  const std::size_t h = config_.hidden_size;
  const std::size_t out_rows = output_rows(step.wanted, step.rows);
  if (step.rows == 0 || step.states.size() != step.rows * h || step.out.size() != out_rows * h) {
    return absl::InvalidArgumentError(
        cat("a step of ", step.rows, " rows has ", step.states.size(), " numbers and room for ",
            step.out.size(), "; at a hidden size of ", h, " it needs at least one row, ",
            step.rows * h, " and ", out_rows * h));
  }
  if (step.start_pos > cache->kv_len()) {
    return absl::InvalidArgumentError(cat("the step starts at position ", step.start_pos,
                                          ", but the session holds ", cache->kv_len()));
  }
  if (step.rows > info_.max_context - step.start_pos) {
    return absl::InvalidArgumentError(cat("the step ends at position ",
                                          std::uint64_t{step.start_pos} + step.rows,
                                          ", beyond the context of ", info_.max_context));
  }
  // Attention weighs positions that a row does not see with 0, which would not silence a NaN.
  if (!std::all_of(step.states.begin(), step.states.end(),
                   [](float value) { return std::isfinite(value); })) {
    return absl::InvalidArgumentError("the step's states have values that are not finite");
  }
  return cache->resize(step.start_pos, step.start_pos + step.rows);
}

void CpuBody::run(std::span<BodyStep> steps) {
  const absl::Status status = guarded([&] {
    run_steps(steps);
    return absl::OkStatus();
  });
  if (status.ok()) return;
  parts_.clear();
  m_ = 0;
  for (BodyStep& step : steps) {
    step.status = status;
    // No cache may say that it holds positions that were never computed.
    auto* cache = dynamic_cast<KvCache*>(step.session);
    if (cache != nullptr && cache->owner() == this && cache->kv_len() > step.start_pos) {
      (void)cache->resize(step.start_pos, step.start_pos);
    }
  }
}

void CpuBody::run_steps(std::span<BodyStep> steps) {
  std::size_t positions = 0;
  for (std::size_t i = 0; i < steps.size(); ++i) {
    steps[i].status = prepare(steps[i], steps.first(i));
    if (steps[i].status.ok())
      positions = std::max<std::size_t>(positions, steps[i].start_pos + steps[i].rows);
  }
  rope_.extend(positions);

  // Steps are put end to end and cut into batches; a step's rows stay in order.
  parts_.clear();
  m_ = 0;
  for (BodyStep& step : steps) {
    if (!step.status.ok()) continue;
    for (std::size_t first = 0; first < step.rows;) {
      const std::size_t count = std::min<std::size_t>(step.rows - first, kBatchRows - m_);
      parts_.push_back({&step,
                        first,
                        {.cache = static_cast<KvCache*>(step.session),
                         .row = m_,
                         .rows = count,
                         .position = step.start_pos + first}});
      m_ += count;
      first += count;
      if (m_ == kBatchRows) run_batch();
    }
  }
  if (m_ > 0) run_batch();
}

// Passes the rows of parts_ through all layers, hands out what is wanted and empties the batch.
void CpuBody::run_batch() {
  const std::size_t h = config_.hidden_size, d = config_.head_dim;
  const std::size_t q_size = config_.n_heads * d, kv_size = config_.n_kv_heads * d;
  x_ = rows(x_buffer_, m_, h);
  hidden_ = rows(hidden_buffer_, m_, h);
  qkv_ = rows(qkv_buffer_, m_, q_size + 2 * kv_size);
  heads_ = rows(heads_buffer_, m_, q_size);
  gate_ = rows(gate_buffer_, m_, config_.intermediate_size);
  up_ = rows(up_buffer_, m_, config_.intermediate_size);
  for (const Part& part : parts_) {
    std::memcpy(x_[part.segment.row], part.step->states.data() + part.first * h,
                part.segment.rows * h * sizeof(float));
  }

  plan_attention();
  norm(x_, weights_.layers[0].attention_gain, hidden_);
  for (std::size_t layer = 0; layer < config_.n_layers; ++layer) {
    const LayerWeights& w = weights_.layers[layer];
    const bool is_last = layer + 1 == config_.n_layers;
    multiply({w.q.into(qkv_), w.k.into(columns(qkv_, q_size)),
              w.v.into(columns(qkv_, q_size + kv_size))},
             hidden_);
    place_keys_and_values(layer, w);
    // What follows in the last layer is for the rows that leave only.
    if (is_last) keep_wanted_rows();
    if (m_ == 0) break;

    attention_.run(layer, qkv_, heads_);
    multiply({w.o.into(hidden_)}, heads_);
    add_and_norm(hidden_, w.mlp_gain);
    mlp(w);
    multiply({w.down.into(hidden_)}, gate_);
    add_and_norm(hidden_,
                 is_last ? weights_.final_gain : weights_.layers[layer + 1].attention_gain);
  }

  for (const Part& part : parts_) {
    if (part.segment.rows == 0) continue;
    float* out = part.step->out.data() + (part.step->wanted == Wanted::kAll ? part.first * h : 0);
    std::memcpy(out, hidden_[part.segment.row], part.segment.rows * h * sizeof(float));
  }
  parts_.clear();
  m_ = 0;
}

void CpuBody::plan_attention() {
  segments_.clear();
  for (const Part& part : parts_) {
    if (part.segment.rows > 0) segments_.push_back(part.segment);
  }
  attention_.plan(segments_);
}

// Moves the wanted rows of the residual stream and the queries to the front.
void CpuBody::keep_wanted_rows() {
  std::size_t kept = 0;
  for (Part& part : parts_) {
    Segment& s = part.segment;
    const bool ends = part.first + s.rows == part.step->rows;
    const std::size_t wanted = part.step->wanted == Wanted::kAll            ? s.rows
                               : part.step->wanted == Wanted::kLast && ends ? 1
                                                                            : 0;
    const std::size_t skipped = s.rows - wanted;
    std::memmove(x_[kept], x_[s.row + skipped], wanted * x_.stride * sizeof(float));
    std::memmove(qkv_[kept], qkv_[s.row + skipped], wanted * qkv_.stride * sizeof(float));
    s = {.cache = s.cache, .row = kept, .rows = wanted, .position = s.position + skipped};
    part.first += skipped;
    kept += wanted;
  }
  if (kept == m_) return;
  m_ = kept;
  plan_attention();
}

void CpuBody::for_rows(std::size_t row_elements, absl::FunctionRef<void(std::size_t)> body) {
  pool_.for_ranges(m_, kElementwiseGrain / row_elements + 1, 1, [&](const Range& range) {
    for (std::size_t i = range.begin; i < range.end; ++i) body(i);
  });
}

void CpuBody::norm(const Rows& x, const std::vector<float>& gain, const Rows& out) {
  const auto eps = static_cast<float>(config_.rms_norm_eps);
  for_rows(config_.hidden_size, [&](std::size_t i) {
    kernels_.rms_norm(x[i], gain.data(), eps, config_.hidden_size, out[i]);
  });
}

// x += delta; hidden = norm(x) * gain. `delta` may be hidden.
void CpuBody::add_and_norm(const Rows& delta, const std::vector<float>& gain) {
  const auto eps = static_cast<float>(config_.rms_norm_eps);
  for_rows(config_.hidden_size, [&](std::size_t i) {
    float* x = x_[i];
    const float* d = delta[i];
    for (std::size_t j = 0; j < config_.hidden_size; ++j) x[j] += d[j];
    kernels_.rms_norm(x, gain.data(), eps, config_.hidden_size, hidden_[i]);
  });
}

// Norms (Qwen3) and turns queries and keys, and puts keys and values into the sessions' caches.
void CpuBody::place_keys_and_values(std::size_t layer, const LayerWeights& w) {
  const std::size_t d = config_.head_dim;
  const auto eps = static_cast<float>(config_.rms_norm_eps);
  const auto norm_heads = [&](float* x, std::size_t heads, const std::vector<float>& gain) {
    for (std::size_t i = 0; i < heads; ++i, x += d) kernels_.rms_norm(x, gain.data(), eps, d, x);
  };
  for (const Part& part : parts_) {
    const Segment& s = part.segment;
    pool_.for_ranges(s.rows, kElementwiseGrain / qkv_.stride + 1, 1, [&](const Range& range) {
      for (std::size_t i = range.begin; i < range.end; ++i) {
        float* query = qkv_[s.row + i];
        float* key = query + config_.n_heads * d;
        const float* value = key + config_.n_kv_heads * d;
        if (config_.qk_norm) {
          norm_heads(query, config_.n_heads, w.q_gain);
          norm_heads(key, config_.n_kv_heads, w.k_gain);
        }
        rope_.rotate(query, config_.n_heads + config_.n_kv_heads, s.position + i);
        s.cache->store(kernels_, layer, s.position + i, key, value);
      }
    });
  }
}

void CpuBody::multiply(std::initializer_list<Linear> products, const Rows& x) {
  linear(kernels_, pool_, {products.begin(), products.size()}, x, m_);
}

// gate = silu(gate * hidden) * (up * hidden), each thread its own columns from start to end.
void CpuBody::mlp(const LayerWeights& w) {
  const Linear gate = w.gate.into(gate_), up = w.up.into(up_);
  pool_.for_ranges(config_.intermediate_size, linear_grain(m_, 2 * config_.hidden_size),
                   kLinearAlign, [&](const Range& range) {
                     linear_rows(kernels_, gate, hidden_, m_, range.begin, range.end);
                     linear_rows(kernels_, up, hidden_, m_, range.begin, range.end);
                     for (std::size_t i = 0; i < m_; ++i) {
                       kernels_.swiglu(gate_[i] + range.begin, up_[i] + range.begin,
                                       range.end - range.begin);
                     }
                   });
}

// What engine_prep says about the folder; an absent file leaves the fingerprints zero.
absl::Status read_manifest(const std::filesystem::path& folder, BodyInfo& info) {
  constexpr std::size_t kMaxManifestBytes = 1 << 20;
  const std::filesystem::path file = folder / "infemeral.json";
  const auto text = read_text_file(file, kMaxManifestBytes);
  if (absl::IsNotFound(text.status())) return absl::OkStatus();
  if (!text.ok()) return text.status();
  const auto json = parse_json(*text, file.string());
  if (!json.ok()) return absl::DataLossError(json.status().message());
  const auto version = json->is_object() ? json->find("format_version") : json->end();
  if (version == json->end() ||
      (*version != kBodyFormatVersion && *version != kInt8BodyFormatVersion)) {
    return absl::DataLossError(cat(file.string(), " has a format_version that this build does not ",
                                   "read; run its engine_prep again"));
  }
  for (const auto& [name, field] : {std::pair{"model_fingerprint", &info.model_fingerprint},
                                    std::pair{"cloak_commitment", &info.cloak_commitment}}) {
    const auto it = json->is_object() ? json->find(name) : json->end();
    const auto value = it != json->end() && it->is_string()
                           ? parse_fingerprint(it->get_ref<const std::string&>())
                           : std::nullopt;
    if (!value) {
      return absl::DataLossError(
          cat(file.string(), ": ", name, " is not 64 hexadecimal digits; run engine_prep again"));
    }
    *field = *value;
  }
  return absl::OkStatus();
}

// A folder without config.json: what it probably is, so that the user can name the right one.
absl::Status not_a_body(const std::filesystem::path& folder) {
  std::error_code ignored;
  const auto holds = [&](const char* name) {
    return std::filesystem::exists(folder / name, ignored);
  };
  return absl::NotFoundError(cat(
      folder.string(), " is not a body folder",
      holds("body/config.json") ? cat("; it holds one, though: use ", (folder / "body").string())
      : holds("engine.json")    ? "; it is a client folder: use the body folder beside it"
                                : "; use the body folder that engine_prep wrote"));
}

absl::StatusOr<std::unique_ptr<Body>> load(const std::filesystem::path& folder,
                                           const CpuBodyOptions& options) {
  const auto kernels = simd::choose_kernels();
  if (!kernels.ok()) return kernels.status();
  std::error_code ignored;
  if (!std::filesystem::exists(folder / "config.json", ignored)) return not_a_body(folder);
  auto weights = BodyWeights::load(folder);
  if (!weights.ok()) return weights.status();
  const ModelConfig& config = weights->config;
  if (options.max_context > config.max_context) {
    return absl::InvalidArgumentError(cat("a context of ", options.max_context,
                                          " positions was asked for; the model in ",
                                          folder.string(), " has ", config.max_context));
  }
  std::string dtype(dtype_name(weights->dtype));
  std::transform(dtype.begin(), dtype.end(), dtype.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  BodyInfo info{.description = cat(config.model_type, " ", config.n_layers, " layers ", dtype),
                .hidden_size = static_cast<std::uint32_t>(config.hidden_size),
                .max_context = options.max_context > 0
                                   ? options.max_context
                                   : static_cast<std::uint32_t>(config.max_context),
                .kv_bytes_per_token = CpuBody::kv_shape(*weights).bytes_per_position()};
  if (absl::Status status = read_manifest(folder, info); !status.ok()) return status;
  return std::make_unique<CpuBody>(*std::move(weights), std::move(info), **kernels,
                                   options.threads);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Body>> load_cpu_body(const std::filesystem::path& folder,
                                                    const CpuBodyOptions& options) {
  return guarded_or<std::unique_ptr<Body>>([&] { return load(folder, options); });
}

}  // namespace infemeral
