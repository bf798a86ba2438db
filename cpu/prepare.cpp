#include "cpu/prepare.h"

#include <oneapi/tbb/task_arena.h>
#include <stdlib.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_format.h"
#include "cpu/body_weights.h"
#include "cpu/client_tables.h"
#include "cpu/model_hash.h"
#include "cpu/parallel.h"
#include "cpu/rotate_body.h"
#include "cpu/rotation.h"
#include "cpu/self_check.h"
#include "engine/fingerprint.h"
#include "engine/json_file.h"
#include "engine/text.h"

namespace infemeral {
namespace {

namespace fs = std::filesystem;

constexpr char kEmbed[] = "model.embed_tokens.weight";
constexpr char kHead[] = "lm_head.weight";
constexpr char kFinalNorm[] = "model.norm.weight";
constexpr std::size_t kMaxConfigBytes = 16 << 20;
constexpr std::size_t kBlockElements = 1 << 20;  // of a client tensor, converted at a time

std::string megabytes(std::size_t bytes) {
  return absl::StrFormat("%.1f MB", static_cast<double>(bytes) / 1e6);
}

// Equal values; the dtypes may differ.
bool equal_tensors(const TensorView& a, const TensorView& b) {
  if (a.shape != b.shape) return false;
  if (a.dtype == b.dtype && std::ranges::equal(a.data, b.data)) return true;
  std::vector<float> left, right;
  for (std::size_t begin = 0; begin < a.elements(); begin += kBlockElements) {
    left.resize(std::min(kBlockElements, a.elements() - begin));
    right.resize(left.size());
    a.read(begin, left);
    b.read(begin, right);
    if (left != right) return false;
  }
  return true;
}

class Preparation {
 public:
  explicit Preparation(const PrepareOptions& options) : o_(options) {}

  absl::StatusOr<PrepareResult> run() {
    for (const auto step :
         {&Preparation::read_model, &Preparation::check_output, &Preparation::detect_tied,
          &Preparation::make_cloak, &Preparation::write_client_weights, &Preparation::write_body,
          &Preparation::write_descriptions, &Preparation::check_body, &Preparation::publish}) {
      if (o_.stop.stop_requested()) return interrupted();
      if (absl::Status status = (this->*step)(); !status.ok()) return status;
    }
    return std::move(result_);
  }

  ~Preparation() {
    std::error_code ignored;
    if (!temp_.empty()) fs::remove_all(temp_, ignored);
    if (made_output_) fs::remove(o_.output_dir, ignored);  // only when nothing is in it
  }
  Preparation(const Preparation&) = delete;
  Preparation& operator=(const Preparation&) = delete;

 private:
  static absl::Status interrupted() { return absl::CancelledError("preparation was interrupted"); }
  void say(LogLevel level, const std::string& message) { log_to(o_.log, level, message); }
  void progress(std::string_view stage, double done, double total) {
    if (o_.progress) o_.progress(stage, done, total);
  }

  absl::Status read_model() {
    if (o_.max_shard_bytes == 0) {
      return absl::InvalidArgumentError("the body's shards must have a size");
    }
    for (const char* name : {"config.json", "tokenizer.json"}) {
      std::error_code ignored;
      if (fs::exists(o_.model_dir / name, ignored)) continue;
      return absl::NotFoundError(
          cat(o_.model_dir.string(), " holds no ", name,
              fs::exists(o_.model_dir / "infemeral.json", ignored) ||
                      fs::exists(o_.model_dir / "client" / "engine.json", ignored)
                  ? "; it is what engine_prep wrote: give the model that this was made from"
                  : "; give a model's folder in Hugging Face's format, with config.json, "
                    "*.safetensors and tokenizer.json"));
    }
    auto config = load_model_config(o_.model_dir);
    if (!config.ok()) return config.status();
    result_.config = *std::move(config);
    auto model = Safetensors::open_folder(o_.model_dir);
    if (!model.ok()) return model.status();
    model_ = *std::move(model);

    const auto get = [&](const char* name, std::vector<std::size_t> shape, TensorView& out) {
      auto view = model_.get(name, shape);
      if (view.ok()) out = *std::move(view);
      return view.status();
    };
    const std::size_t hidden = result_.config.hidden_size;
    if (absl::Status s = get(kEmbed, {result_.config.vocab_size, hidden}, embed_); !s.ok())
      return s;
    return get(kFinalNorm, {hidden}, final_norm_);
  }

  // Refuses what would be overwritten, before any work, and makes the temporary folder.
  absl::Status check_output() {
    std::error_code error;
    for (const auto& [part, marker] :
         {std::pair("client", "engine.json"), std::pair("body", "infemeral.json")}) {
      const fs::path folder = o_.output_dir / part;
      if (!fs::exists(fs::symlink_status(folder, error))) continue;
      if (!o_.overwrite) {
        return absl::AlreadyExistsError(
            cat(folder.string(), " exists; choose another output folder or allow overwriting"));
      }
      if (!fs::exists(folder / marker, error)) {
        return absl::AlreadyExistsError(cat(folder.string(), " was not written by engine_prep (no ",
                                            marker, " in it); remove it yourself"));
      }
    }
    made_output_ = fs::create_directories(o_.output_dir, error);
    if (error) return errno_status(error.value(), "cannot make", o_.output_dir);
    std::string name = (o_.output_dir / ".tmp-XXXXXX").string();
    if (::mkdtemp(name.data()) == nullptr) return errno_status(errno, "cannot make", name);
    temp_ = name;
    for (const char* part : {"client", "body"}) {
      if (::mkdir((temp_ / part).c_str(), 0755) != 0) {
        return errno_status(errno, "cannot make", temp_ / part);
      }
    }
    return absl::OkStatus();
  }

  // By comparing the tensors; what the configuration says only matters when there is one tensor.
  absl::Status detect_tied() {
    const std::size_t shape[] = {result_.config.vocab_size, result_.config.hidden_size};
    const bool has_head = model_.find(kHead) != nullptr || model_.unread().contains(kHead);
    const bool says_tied = result_.config.tie_word_embeddings;
    if (!has_head && !says_tied) {
      return absl::InvalidArgumentError(cat(
          o_.model_dir.string(), " has no ", kHead,
          ", and its config.json does not say tie_word_embeddings; the checkpoint is incomplete"));
    }
    if (has_head) {
      auto head = model_.get(kHead, shape);
      if (!head.ok()) return head.status();
      head_ = *std::move(head);
    }
    result_.tied_embeddings = !has_head || equal_tensors(embed_, head_);
    if (has_head) {  // two gigabytes of a large model
      model_.release_pages(embed_);
      model_.release_pages(head_);
    }
    if (!result_.tied_embeddings) {
      if (says_tied) {
        say(LogLevel::kWarning, cat("config.json says tie_word_embeddings, but ", kHead,
                                    " differs from the embedding; both are kept"));
      }
      return absl::OkStatus();
    }
    const std::size_t table_bytes = embed_.elements() * dtype_bytes(Dtype::kF16);
    if (folded()) {
      say(LogLevel::kInfo, cat("embeddings are tied, but folded tables are two: ", kHead,
                               " takes another ", megabytes(table_bytes)));
      return absl::OkStatus();
    }
    result_.saved_bytes = table_bytes;
    say(LogLevel::kInfo, cat("embeddings are tied: ", kHead, " is not stored, which saves ",
                             megabytes(result_.saved_bytes)));
    return absl::OkStatus();
  }

  absl::Status make_cloak() {
    progress("cloak", 0, 2);
    if (o_.seed == nullptr) own_seed_ = CloakSeed::random();
    const CloakSeed& seed = o_.seed != nullptr ? *o_.seed : *own_seed_;
    auto cloak = Cloak::generate(seed, result_.config.hidden_size);
    if (!cloak.ok()) return cloak.status();
    if (o_.stop.stop_requested()) return interrupted();
    progress("cloak", 1, 2);
    commitment_ = seed.commitment();
    orthogonality_error_ = cloak->orthogonality_error();
    if (absl::Status s = seed.save(temp_ / "client" / "cloak.key"); !s.ok()) return s;
    if (o_.cloak_mode == CloakMode::kEager) {
      const fs::path file = temp_ / "client" / "cloak.safetensors";
      if (absl::Status s = cloak->save(file, seed); !s.ok()) return s;
    }
    auto rotation = Rotation::make(*cloak);
    if (!rotation.ok()) return rotation.status();
    rotation_.emplace(*std::move(rotation));
    progress("cloak", 2, 2);
    return absl::OkStatus();
  }

  bool folded() const { return o_.cloak_mode == CloakMode::kFolded; }

  ClientTables tables() const {
    return {.embed = embed_,
            .lm_head = head_.data.data() != nullptr ? head_ : embed_,
            .final_norm = final_norm_,
            .tied = result_.tied_embeddings};
  }

  absl::Status write_client_weights() {
    const auto bytes = write_client_tables(
        temp_ / "client" / "client.safetensors", tables(), model_,
        {.fold = folded() ? &*rotation_ : nullptr,
         .commitment = commitment_,
         .progress = [this](double done, double total) { progress("client", done, total); },
         .stop = o_.stop},
        hash_);
    if (!bytes.ok()) return bytes.status();
    result_.client_bytes = *bytes;
    // Of tied tables that are stored twice only one was read.
    if (head_.data.data() != nullptr) hash_.add(kHead, head_);
    return absl::OkStatus();
  }

  absl::Status write_body() {
    const auto bytes = rotate_body(
        result_.config, model_, *rotation_,
        {.dtype = o_.body_dtype,
         .max_shard_bytes = o_.max_shard_bytes,
         .progress = [this](double done, double total) { progress("body", done, total); },
         .stop = o_.stop},
        temp_ / "body", hash_);
    if (!bytes.ok()) return bytes.status();
    result_.body_bytes = *bytes;
    // What is left belongs to the fingerprint too, but to no part of the forward pass that we know.
    for (const auto& [name, tensor] : model_.tensors()) {
      if (!hash_.add(name, tensor)) continue;
      model_.release_pages(tensor);
      // Old checkpoints carry RoPE's frequencies, which follow from the configuration.
      if (name.ends_with("rotary_emb.inv_freq")) continue;
      say(LogLevel::kWarning, cat("tensor ", quote_name(name), " is no part of a ",
                                  result_.config.model_type, " model and is left out"));
    }
    result_.model_fingerprint = hash_.finish(result_.config);
    return absl::OkStatus();
  }

  absl::Status write_descriptions() {
    const ModelConfig& config = result_.config;
    if (absl::Status s =
            save_client_manifest({.model_type = config.model_type,
                                  .hidden_size = config.hidden_size,
                                  .vocab_size = config.vocab_size,
                                  .max_context = config.max_context,
                                  .tied_embeddings = result_.tied_embeddings && !folded(),
                                  .cloak_mode = o_.cloak_mode,
                                  .model_fingerprint = result_.model_fingerprint,
                                  .cloak_commitment = commitment_},
                                 temp_ / "client");
        !s.ok()) {
      return s;
    }
    if (absl::Status s = write_generation_config(); !s.ok()) return s;
    for (const char* name : {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                             "chat_template.jinja"}) {
      std::error_code error;
      if (!fs::exists(o_.model_dir / name, error)) continue;
      const fs::path copy = temp_ / "client" / name;
      fs::copy_file(o_.model_dir / name, copy, error);
      if (error) return errno_status(error.value(), cat("cannot copy ", name, " to"), copy);
    }
    if (absl::Status s = write_body_config(); !s.ok()) return s;
    const nlohmann::ordered_json manifest = {
        {"format_version",
         o_.body_dtype == Dtype::kI8 ? kInt8BodyFormatVersion : kBodyFormatVersion},
        {"body_dtype", dtype_name(o_.body_dtype)},
        {"model_fingerprint", fingerprint_text(result_.model_fingerprint)},
        {"cloak_commitment", fingerprint_text(commitment_)},
    };
    return write_new_file(temp_ / "body" / "infemeral.json", manifest.dump(2) + "\n", 0644);
  }

  // Many folders name the end token in config.json alone, which stays behind: without it generation
  // would never end. Hugging Face falls back to it too.
  absl::Status write_generation_config() {
    nlohmann::json generation = nlohmann::json::object();
    for (const char* name : {"generation_config.json", "config.json"}) {
      const auto text = read_text_file(o_.model_dir / name, kMaxConfigBytes);
      if (absl::IsNotFound(text.status())) continue;
      if (!text.ok()) return text.status();
      const auto json = parse_json(*text, name);
      if (!json.ok()) return json.status();
      if (!json->is_object()) return absl::InvalidArgumentError(cat(name, " is not an object"));
      if (generation.empty() && name == std::string_view("generation_config.json")) {
        generation = *json;
      } else if (!generation.contains("eos_token_id") && json->contains("eos_token_id")) {
        generation["eos_token_id"] = (*json)["eos_token_id"];
      }
    }
    return write_new_file(temp_ / "client" / "generation_config.json", generation.dump(2) + "\n",
                          0644);
  }

  absl::Status write_body_config() {
    const auto text = read_text_file(o_.model_dir / "config.json", kMaxConfigBytes);
    if (!text.ok()) return text.status();
    auto config = parse_json(*text, "config.json");
    if (!config.ok()) return config.status();
    nlohmann::json& c = *config;
    const char* dtype = o_.body_dtype == Dtype::kF16    ? "float16"
                        : o_.body_dtype == Dtype::kBF16 ? "bfloat16"
                                                        : "float32";
    // Loaders that do not know the format must not take the integers for weights.
    if (o_.body_dtype == Dtype::kI8) {
      c["quantization_config"] = {{"quant_method", ModelConfig::kInt8Method}};
    }
    // transformers 5 writes "dtype", earlier ones "torch_dtype".
    if (c.contains("dtype")) c["dtype"] = dtype;
    if (c.contains("torch_dtype") || !c.contains("dtype")) c["torch_dtype"] = dtype;
    c["vocab_size"] = 1;
    c["tie_word_embeddings"] = true;
    for (const char* name : {"bos_token_id", "eos_token_id", "pad_token_id"}) c[name] = nullptr;
    c.erase("_name_or_path");
    return write_new_file(temp_ / "body" / "config.json", c.dump(2) + "\n", 0644);
  }

  // On the files as they are now: what stands in them is what a server will read.
  absl::Status check_body() {
    if (folded()) {
      const auto check =
          check_folded_tables(temp_ / "client" / "client.safetensors", tables(), *rotation_);
      if (!check.ok()) return check.status();
      if (!(check->error <= check->tolerance)) {
        return absl::InternalError(cat("self-check failed: the client's folded tables are off by ",
                                       check->error, "; allowed is ", check->tolerance));
      }
    }
    const auto body = Safetensors::open_folder(temp_ / "body");
    if (!body.ok()) return body.status();
    const auto config = load_model_config(temp_ / "body");
    if (!config.ok()) return config.status();
    const std::size_t last = config->n_layers - 1;
    std::vector<std::size_t> layers = {0};
    if (last > 0) layers.push_back(last);
    for (std::size_t i = 0; i < layers.size(); ++i) {
      progress("check", static_cast<double>(i), static_cast<double>(layers.size()));
      const auto check = self_check(*config, model_, *body, *rotation_, orthogonality_error_,
                                    o_.body_dtype, layers[i]);
      if (!check.ok()) return check.status();
      if (!(check->error <= check->tolerance)) {
        return absl::InternalError(cat("self-check failed: layer ", layers[i],
                                       " of the rotated body is off by ", check->error,
                                       " of what the layer adds; allowed is ", check->tolerance));
      }
      if (i == 0 || check->error > result_.check_error) {
        result_.check_error = check->error;
        result_.check_tolerance = check->tolerance;
      }
      if (o_.stop.stop_requested()) return interrupted();
    }
    progress("check", 1, 1);
    say(LogLevel::kInfo,
        absl::StrFormat("self-check: rotated blocks differ by %.2g of what they add (allowed %.2g)",
                        result_.check_error, result_.check_tolerance));
    return absl::OkStatus();
  }

  // Renames: both folders are there complete, or those that were there before. What is replaced
  // moves into the temporary folder, and goes with it.
  absl::Status publish() {
    std::vector<std::pair<fs::path, fs::path>> moved;
    for (const char* part : {"body", "client"}) {
      const fs::path target = o_.output_dir / part;
      const fs::path old = temp_ / cat("old-", part);
      std::error_code error, ignored;
      const auto move = [&](const fs::path& from, const fs::path& to) {
        if (error) return;
        fs::rename(from, to, error);
        if (!error) moved.emplace_back(from, to);
      };
      if (fs::exists(fs::symlink_status(target, ignored))) move(target, old);
      move(temp_ / part, target);
      if (!error) continue;
      for (; !moved.empty(); moved.pop_back()) {
        fs::rename(moved.back().second, moved.back().first, ignored);
      }
      return errno_status(error.value(), "cannot rename to", target);
    }
    made_output_ = false;
    return absl::OkStatus();
  }

  const PrepareOptions& o_;
  PrepareResult result_;
  Safetensors model_;
  TensorView embed_, head_, final_norm_;
  std::optional<CloakSeed> own_seed_;
  Fingerprint commitment_{};
  double orthogonality_error_ = 0;
  std::optional<Rotation> rotation_;
  ModelHash hash_;
  fs::path temp_;
  bool made_output_ = false;
};

}  // namespace

absl::StatusOr<PrepareResult> prepare_model(const PrepareOptions& options) {
  try {
    tbb::task_arena arena(options.threads > 0 ? options.threads : physical_cores());
    return arena.execute([&] { return Preparation(options).run(); });
  } catch (const std::bad_alloc&) {
    return absl::ResourceExhaustedError("not enough memory to prepare this model");
  } catch (const std::exception& e) {
    return absl::InternalError(cat("preparation failed: ", e.what()));
  }
}

}  // namespace infemeral
