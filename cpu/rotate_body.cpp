#include "cpu/rotate_body.h"

#include <oneapi/tbb/blocked_range.h>
#include <oneapi/tbb/parallel_for.h>
#include <oneapi/tbb/parallel_invoke.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_format.h"
#include "cpu/disk_queue.h"
#include "cpu/huge_pages.h"
#include "cpu/int8_weights.h"
#include "cpu/narrow.h"
#include "cpu/reference_block.h"
#include "engine/json_file.h"
#include "engine/text.h"

namespace infemeral {
namespace {

// A block is all that is held of a matrix in float64 or float32 at a time: so many rows of one that
// reads the stream, or columns of one that writes it.
constexpr std::size_t kBlock = 4096;

// What stands in a file, in memory that may be larger.
struct Block {
  HugeArray<std::byte> memory;
  std::size_t size;

  std::byte* data() { return memory.data(); }
};

// Memory that is used again and again: from the system it comes cleared, which takes longer than
// writing to it.
class BlockPool {
 public:
  Block take(std::size_t size) {
    {
      const std::lock_guard lock(mutex_);
      for (auto& memory : free_) {
        if (memory.bytes() < size) continue;
        std::swap(memory, free_.back());
        Block block{std::move(free_.back()), size};
        free_.pop_back();
        return block;
      }
      if (!free_.empty()) free_.pop_back();  // a larger one comes in its place
    }
    return {HugeArray<std::byte>(size), size};
  }
  void give_back(Block block) {
    const std::lock_guard lock(mutex_);
    free_.push_back(std::move(block.memory));
  }

 private:
  std::mutex mutex_;
  std::vector<HugeArray<std::byte>> free_;
};

enum class Make {
  kZeros,      // the embedding that stock loaders expect
  kOnes,       // gains that were folded away
  kCopy,       // what lives in head space
  kRead,       // W diag(gain) Q^-T
  kWrite,      // Q^T W
  kWriteBias,  // b Q
};

struct BodyTensor {
  std::string name;
  std::vector<std::size_t> shape;
  Make make;
  TensorView source = {};
  TensorView gain = {};  // kRead

  std::size_t elements() const {
    std::size_t n = 1;
    for (const std::size_t size : shape) n *= size;
    return n;
  }
  // In a body of `dtype`: only matrices are kept as I8.
  Dtype stored_as(Dtype dtype) const {
    const bool is_matrix = make == Make::kRead || make == Make::kWrite;
    return dtype == Dtype::kI8 && !is_matrix ? Dtype::kF32 : dtype;
  }
};

absl::StatusOr<std::vector<BodyTensor>> plan(const ModelConfig& config, const Safetensors& model) {
  std::vector<BodyTensor> tensors;
  tensors.push_back({"model.embed_tokens.weight", {1, config.hidden_size}, Make::kZeros});
  for (std::size_t i = 0; i < config.n_layers; ++i) {
    const auto layer = find_layer(model, config, i);
    if (!layer.ok()) return layer.status();
    const std::string prefix = layer_prefix(i);
    const auto put = [&](const char* name, Make make, const TensorView& source,
                         const TensorView& gain = {}) {
      if (source.shape.empty()) return;  // optional, and this architecture lacks it
      tensors.push_back({prefix + name, source.shape, make, source, gain});
    };
    const LayerTensors& t = *layer;
    put("input_layernorm.weight", Make::kOnes, t.input_gain);
    put("self_attn.q_proj.weight", Make::kRead, t.q, t.input_gain);
    put("self_attn.q_proj.bias", Make::kCopy, t.q_bias);
    put("self_attn.k_proj.weight", Make::kRead, t.k, t.input_gain);
    put("self_attn.k_proj.bias", Make::kCopy, t.k_bias);
    put("self_attn.v_proj.weight", Make::kRead, t.v, t.input_gain);
    put("self_attn.v_proj.bias", Make::kCopy, t.v_bias);
    put("self_attn.q_norm.weight", Make::kCopy, t.q_gain);
    put("self_attn.k_norm.weight", Make::kCopy, t.k_gain);
    put("self_attn.o_proj.weight", Make::kWrite, t.o);
    put("self_attn.o_proj.bias", Make::kWriteBias, t.o_bias);
    put("post_attention_layernorm.weight", Make::kOnes, t.post_gain);
    put("mlp.gate_proj.weight", Make::kRead, t.gate, t.post_gain);
    put("mlp.gate_proj.bias", Make::kCopy, t.gate_bias);
    put("mlp.up_proj.weight", Make::kRead, t.up, t.post_gain);
    put("mlp.up_proj.bias", Make::kCopy, t.up_bias);
    put("mlp.down_proj.weight", Make::kWrite, t.down);
    put("mlp.down_proj.bias", Make::kWriteBias, t.down_bias);
  }
  const std::size_t norm_shape[] = {config.hidden_size};
  const auto norm = model.get("model.norm.weight", norm_shape);
  if (!norm.ok()) return norm.status();
  tensors.push_back({"model.norm.weight", {config.hidden_size}, Make::kOnes, *norm});
  return tensors;
}

// Tensors one after the other into one file, or into shards of at most max_bytes (a tensor is never
// cut) with an index as Hugging Face names them. The disk is waited for by a thread of its own: an
// error shows at a later call, at finish() at the latest.
class ShardWriter {
 public:
  ShardWriter(std::filesystem::path folder, const std::vector<BodyTensor>& tensors, Dtype dtype,
              std::size_t max_bytes)
      : folder_(std::move(folder)) {
    std::size_t shard_bytes = 0;
    for (const BodyTensor& tensor : tensors) {
      const Dtype stored = tensor.stored_as(dtype);
      const bool scaled = stored == Dtype::kI8;
      const std::size_t bytes =
          tensor.elements() * dtype_bytes(stored) + (scaled ? tensor.shape[0] * sizeof(float) : 0);
      if (shards_.empty() || (shard_bytes > 0 && bytes > max_bytes - shard_bytes)) {
        shards_.emplace_back();
        shard_bytes = 0;
      }
      shards_.back().push_back({tensor.name, stored, tensor.shape});
      if (scaled) {
        shards_.back().push_back({scale_name(tensor.name), Dtype::kF32, {tensor.shape[0]}});
      }
      shard_bytes += bytes;
      total_bytes_ += bytes;
    }
  }

  std::size_t total_bytes() const { return total_bytes_; }

  // The next tensor begins; its bytes come through write().
  absl::Status begin_tensor() {
    if (left_in_shard_ > 0) {
      --left_in_shard_;
      return absl::OkStatus();
    }
    auto next = SafetensorsWriter::create(folder_ / file_name(next_shard_), shards_[next_shard_],
                                          {{"format", "pt"}});
    if (!next.ok()) return next.status();
    left_in_shard_ = shards_[next_shard_].size() - 1;
    ++next_shard_;
    return queue_.add(0, [this, next = *std::move(next)]() mutable {
      if (writer_ != nullptr) {
        if (absl::Status status = writer_->finish(); !status.ok()) return status;
      }
      writer_ = std::move(next);
      return absl::OkStatus();
    });
  }
  absl::Status write(Block block) {
    const std::size_t size = block.size;
    return queue_.add(size, [this, block = std::move(block)]() mutable {
      absl::Status status = writer_->write({block.data(), block.size});
      pool_.give_back(std::move(block));
      return status;
    });
  }
  BlockPool& pool() { return pool_; }

  absl::Status finish() {
    if (absl::Status s = queue_.add(0, [this] { return writer_->finish(); }); !s.ok()) return s;
    if (absl::Status s = queue_.finish(); !s.ok() || shards_.size() == 1) return s;
    nlohmann::ordered_json map = nlohmann::ordered_json::object();
    for (std::size_t i = 0; i < shards_.size(); ++i) {
      for (const auto& tensor : shards_[i]) map[tensor.name] = file_name(i);
    }
    const nlohmann::ordered_json index = {{"metadata", {{"total_size", total_bytes_}}},
                                          {"weight_map", map}};
    return write_new_file(folder_ / "model.safetensors.index.json", index.dump(2) + "\n", 0644);
  }

 private:
  std::string file_name(std::size_t shard) const {
    if (shards_.size() == 1) return "model.safetensors";
    return absl::StrFormat("model-%05d-of-%05d.safetensors", shard + 1, shards_.size());
  }

  std::filesystem::path folder_;
  std::vector<std::vector<SafetensorsWriter::Declaration>> shards_;
  std::size_t total_bytes_ = 0;
  std::size_t next_shard_ = 0, left_in_shard_ = 0;
  std::unique_ptr<SafetensorsWriter> writer_;  // the queue's, as long as that runs
  BlockPool pool_;
  DiskQueue queue_;  // the last member: its thread uses the others
};

// Makes the tensors of a plan, in T: sixteen bits, or eight, round more than float32 products do
// (cpu/rotation.h). Conversions and products run on all threads of the arena.
template <typename T>
class Maker {
 public:
  Maker(const Rotation& rotation, const RotateBodyOptions& options, ShardWriter& writer,
        double total)
      : rotation_(rotation),
        options_(options),
        writer_(writer),
        total_(total),
        w_(kBlock * rotation.hidden_size()),
        folded_(kBlock * rotation.hidden_size()) {}

  absl::Status make(const BodyTensor& tensor) {
    faults_ = {};
    dtype_ = tensor.stored_as(options_.dtype);
    // Int8 rows are made from float32 ones.
    row_dtype_ = dtype_ == Dtype::kI8 ? Dtype::kF32 : dtype_;
    scales_.assign(dtype_ == Dtype::kI8 ? tensor.shape[0] : 0, 0.0f);
    absl::Status status;
    switch (tensor.make) {
      case Make::kZeros:
        status = write_constant(tensor, 0);
        break;
      case Make::kOnes:
        status = write_constant(tensor, 1);
        break;
      case Make::kCopy:
      case Make::kWriteBias:
        status = write_vector(tensor);
        break;
      case Make::kRead:
        status = fold_read(tensor);
        break;
      case Make::kWrite:
        status = fold_write(tensor);
        break;
    }
    if (!status.ok()) return status;
    if (faults_.count > 0) {
      return absl::InvalidArgumentError(
          cat("the body's tensor ", quote_name(tensor.name), " has ", faults_.count,
              " values that ", dtype_name(row_dtype_), " cannot hold, the largest ",
              faults_.largest, "; choose another body dtype, or check the model's file"));
    }
    return absl::OkStatus();
  }

 private:
  absl::Status advance(std::size_t elements) {
    done_ += static_cast<double>(elements);
    if (options_.progress) options_.progress(done_, total_);
    if (options_.stop.stop_requested()) return absl::CancelledError("preparation was interrupted");
    return absl::OkStatus();
  }

  absl::Status write_constant(const BodyTensor& tensor, double value) {
    return write_values(std::vector<double>(tensor.elements(), value));
  }

  absl::Status write_vector(const BodyTensor& tensor) {
    std::vector<float> raw(tensor.elements());
    tensor.source.read(0, raw);
    std::vector<double> values(raw.begin(), raw.end());
    if (tensor.make == Make::kWriteBias) {
      std::vector<double> rotated(values.size());
      rotation_.rotate(1, values, rotated);
      values = std::move(rotated);
    }
    return write_values(values);
  }

  absl::Status write_values(std::span<const double> values) {
    Block bytes = writer_.pool().take(values.size() * dtype_bytes(dtype_));
    faults_.add(narrow(values, dtype_, bytes.data()));
    if (absl::Status status = writer_.write(std::move(bytes)); !status.ok()) return status;
    return advance(values.size());
  }

  // Rows of W in blocks, each written as it is done.
  absl::Status fold_read(const BodyTensor& tensor) {
    const std::size_t rows = tensor.shape[0], h = tensor.shape[1];
    std::vector<float> gain(h);
    tensor.gain.read(0, gain);
    const std::size_t width = dtype_bytes(row_dtype_);
    for (std::size_t first = 0; first < rows; first += kBlock) {
      const std::size_t count = std::min(kBlock, rows - first);
      each_row(count, [&](std::size_t r, std::vector<float>& scratch) {
        scratch.resize(h);
        widen(tensor.source, (first + r) * h, scratch);
        T* row = w_.data() + r * h;
        for (std::size_t i = 0; i < h; ++i) row[i] = T{scratch[i]} * gain[i];
      });
      rotation_.fold_read(count, std::span<const T>(w_.data(), count * h),
                          std::span(folded_.data(), count * h));
      Block bytes = writer_.pool().take(count * h * width);
      each_row(count, [&](std::size_t r, std::vector<float>&) {
        store(std::span<const T>(folded_.data() + r * h, h), bytes.data() + r * h * width);
      });
      if (absl::Status status = write_rows(first, h, std::move(bytes)); !status.ok()) return status;
      if (absl::Status status = advance(count * h); !status.ok()) return status;
    }
    return write_scales();
  }

  // Columns of W in blocks; the file wants rows, so the result is gathered in its own dtype first.
  absl::Status fold_write(const BodyTensor& tensor) {
    const std::size_t h = tensor.shape[0], cols = tensor.shape[1];
    const std::size_t width = dtype_bytes(row_dtype_);
    Block bytes = writer_.pool().take(h * cols * width);
    for (std::size_t first = 0; first < cols; first += kBlock) {
      const std::size_t count = std::min(kBlock, cols - first);
      each_row(h, [&](std::size_t r, std::vector<float>& scratch) {
        scratch.resize(count);
        widen(tensor.source, r * cols + first, scratch);
        std::copy(scratch.begin(), scratch.end(), w_.data() + r * count);
      });
      rotation_.fold_write(count, std::span<const T>(w_.data(), h * count),
                           std::span(folded_.data(), h * count));
      each_row(h, [&](std::size_t r, std::vector<float>&) {
        store(std::span<const T>(folded_.data() + r * count, count),
              bytes.data() + (r * cols + first) * width);
      });
      if (absl::Status status = advance(h * count); !status.ok()) return status;
    }
    if (absl::Status status = write_rows(0, cols, std::move(bytes)); !status.ok()) return status;
    return write_scales();
  }

  // Whole rows of `cols` row_dtype_ elements, the first of them row `first` of the matrix.
  absl::Status write_rows(std::size_t first, std::size_t cols, Block rows) {
    if (dtype_ != Dtype::kI8) return writer_.write(std::move(rows));
    if (faults_.count > 0) return absl::OkStatus();  // make() says so
    const std::size_t count = rows.size / (cols * sizeof(float));
    Block quantised = writer_.pool().take(count * cols);
    each_row(count, [&](std::size_t r, std::vector<float>& scratch) {
      scratch.resize(cols);
      std::memcpy(scratch.data(), rows.data() + r * cols * sizeof(float), cols * sizeof(float));
      scales_[first + r] =
          quantise_weights(scratch, reinterpret_cast<std::int8_t*>(quantised.data() + r * cols));
    });
    writer_.pool().give_back(std::move(rows));
    return writer_.write(std::move(quantised));
  }

  absl::Status write_scales() {
    if (scales_.empty() || faults_.count > 0) return absl::OkStatus();
    if (absl::Status status = writer_.begin_tensor(); !status.ok()) return status;
    Block bytes = writer_.pool().take(scales_.size() * sizeof(float));
    std::memcpy(bytes.data(), scales_.data(), bytes.size);
    return writer_.write(std::move(bytes));
  }

  // work(row, scratch) for every row, in parallel; scratch is a thread's own.
  template <typename Work>
  static void each_row(std::size_t rows, const Work& work) {
    tbb::parallel_for(tbb::blocked_range<std::size_t>(0, rows, 16), [&](const auto& range) {
      std::vector<float> scratch;
      for (std::size_t r = range.begin(); r != range.end(); ++r) work(r, scratch);
    });
  }

  void store(std::span<const T> values, std::byte* out) {
    const NarrowFaults faults = narrow(values, row_dtype_, out);
    if (faults.count == 0) return;
    const std::lock_guard lock(faults_mutex_);
    faults_.add(faults);
  }

  const Rotation& rotation_;
  const RotateBodyOptions& options_;
  ShardWriter& writer_;
  const double total_;
  double done_ = 0;
  HugeArray<T> w_, folded_;  // a block of a matrix, before and after
  // Of the tensor that is being made: how it is stored, and in what its rows are gathered.
  Dtype dtype_ = Dtype::kF32, row_dtype_ = Dtype::kF32;
  std::vector<float> scales_;
  std::mutex faults_mutex_;
  NarrowFaults faults_;
};

template <typename T>
absl::StatusOr<std::size_t> rotate_in(const ModelConfig& config, const Safetensors& model,
                                      const Rotation& rotation, const RotateBodyOptions& options,
                                      const std::filesystem::path& folder, ModelHash& hash) {
  const auto tensors = plan(config, model);
  if (!tensors.ok()) return tensors.status();
  double total = 0;
  for (const BodyTensor& tensor : *tensors) total += static_cast<double>(tensor.elements());

  ShardWriter writer(folder, *tensors, options.dtype, options.max_shard_bytes);
  Maker<T> maker(rotation, options, writer, total);
  for (std::size_t i = 0; i < tensors->size(); ++i) {
    const BodyTensor& tensor = (*tensors)[i];
    if (i + 1 < tensors->size()) model.prefetch((*tensors)[i + 1].source);
    if (absl::Status status = writer.begin_tensor(); !status.ok()) return status;
    if (tensor.make == Make::kZeros) {
      if (absl::Status status = maker.make(tensor); !status.ok()) return status;
      continue;
    }
    // The hash is one thread's work, and the product most of the others'.
    absl::Status status;
    tbb::parallel_invoke([&] { status = maker.make(tensor); },
                         [&] { hash.add(tensor.name, tensor.source); });
    if (!status.ok()) return status;
    model.release_pages(tensor.source);
  }
  if (absl::Status status = writer.finish(); !status.ok()) return status;
  return writer.total_bytes();
}

}  // namespace

absl::StatusOr<std::size_t> rotate_body(const ModelConfig& config, const Safetensors& model,
                                        const Rotation& rotation, const RotateBodyOptions& options,
                                        const std::filesystem::path& folder, ModelHash& hash) {
  const auto rotate = options.dtype == Dtype::kF32 ? rotate_in<double> : rotate_in<float>;
  return rotate(config, model, rotation, options, folder, hash);
}

}  // namespace infemeral
