#include "cpu/client_tables.h"

#include <oneapi/tbb/blocked_range.h>
#include <oneapi/tbb/parallel_for.h>
#include <oneapi/tbb/parallel_invoke.h>
#include <sodium.h>

#include <algorithm>
#include <cmath>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "absl/cleanup/cleanup.h"
#include "cpu/narrow.h"
#include "engine/text.h"

namespace infemeral {
namespace {

constexpr std::size_t kBlockElements = 1 << 22;  // written as they are, at a time
constexpr std::size_t kGrain = 1 << 16;          // converted by a thread, at a time
constexpr std::size_t kFoldRows = 1024;

struct Part {
  const char* source;  // the plain model's name
  const char* name;
  const TensorView* view;
  Dtype dtype;
  bool is_head = false;
};

class TableWriter {
 public:
  TableWriter(SafetensorsWriter& writer, const ClientTables& tables,
              const ClientTablesOptions& options, double total)
      : writer_(writer), options_(options), total_(total), gain_(tables.final_norm.elements()) {
    tables.final_norm.read(0, gain_);
  }

  absl::Status write(const Part& part) {
    const std::size_t width = gain_.size(), elements = part.view->elements();
    const std::size_t step = options_.fold != nullptr ? kFoldRows * width : kBlockElements;
    NarrowFaults faults;
    for (std::size_t begin = 0; begin < elements; begin += step) {
      std::vector<float> values(std::min(step, elements - begin));
      each_piece(values.size(), [&](std::size_t first, std::size_t count) {
        widen(*part.view, begin + first, std::span(values).subspan(first, count));
      });
      // Folded rows are as secret as the cloak.
      const absl::Cleanup wipe = [&] {
        if (options_.fold != nullptr) sodium_memzero(values.data(), values.size() * sizeof(float));
      };
      if (options_.fold != nullptr) values = fold(part, values);
      const std::size_t size = dtype_bytes(part.dtype);
      std::vector<std::byte> bytes(values.size() * size);
      each_piece(values.size(), [&](std::size_t first, std::size_t count) {
        const NarrowFaults found = narrow(std::span<const float>(values).subspan(first, count),
                                          part.dtype, bytes.data() + first * size);
        const std::lock_guard lock(faults_mutex_);
        faults.add(found);
      });
      const absl::Status written = writer_.write(bytes);
      if (options_.fold != nullptr) sodium_memzero(bytes.data(), bytes.size());
      if (!written.ok()) return written;
      done_ += static_cast<double>(values.size());
      if (options_.progress) options_.progress(done_, total_);
      if (options_.stop.stop_requested()) {
        return absl::CancelledError("preparation was interrupted");
      }
    }
    if (faults.count == 0) return absl::OkStatus();
    return absl::InvalidArgumentError(cat("tensor ", quote_name(part.source), " has ", faults.count,
                                          " values that the client's ", dtype_name(part.dtype),
                                          " cannot hold, the largest ", faults.largest,
                                          "; this model cannot be prepared"));
  }

 private:
  // work(first, count) for pieces of n elements, in parallel.
  template <typename Work>
  static void each_piece(std::size_t n, const Work& work) {
    tbb::parallel_for(tbb::blocked_range<std::size_t>(0, n, kGrain),
                      [&](const auto& range) { work(range.begin(), range.size()); });
  }

  // In float32: its error is lost in the rounding to float16 (cpu/rotation.h).
  std::vector<float> fold(const Part& part, std::vector<float>& values) const {
    const std::size_t width = gain_.size(), rows = values.size() / width;
    std::vector<float> folded(values.size());
    if (part.is_head) {
      for (std::size_t i = 0; i < values.size(); ++i) values[i] *= gain_[i % width];
      options_.fold->fold_read(rows, std::span<const float>(values), folded);
    } else {
      options_.fold->rotate(rows, std::span<const float>(values), folded);
    }
    return folded;
  }

  SafetensorsWriter& writer_;
  const ClientTablesOptions& options_;
  const double total_;
  double done_ = 0;
  std::vector<float> gain_;  // H
  std::mutex faults_mutex_;
};

double norm(const std::vector<double>& x) {
  double squares = 0;
  for (const double value : x) squares += value * value;
  return std::sqrt(squares);
}

std::vector<double> row_of(const TensorView& table, std::size_t row) {
  std::vector<float> values(table.shape[1]);
  table.read(row * values.size(), values);
  return {values.begin(), values.end()};
}

double dot(const std::vector<double>& a, const double* b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

}  // namespace

absl::StatusOr<std::size_t> write_client_tables(const std::filesystem::path& file,
                                                const ClientTables& tables,
                                                const Safetensors& model,
                                                const ClientTablesOptions& options,
                                                ModelHash& hash) {
  constexpr char kEmbed[] = "model.embed_tokens.weight", kHead[] = "lm_head.weight";
  const bool folded = options.fold != nullptr;
  const Part gain = {"model.norm.weight", "final_norm.weight", &tables.final_norm, Dtype::kF32};
  // Widest first: see SafetensorsWriter.
  std::vector<Part> parts;
  if (!folded) parts.push_back(gain);
  parts.push_back({kEmbed, "embed_tokens.weight", &tables.embed, Dtype::kF16});
  if (folded || !tables.tied) {
    parts.push_back({kHead, "lm_head.weight", &tables.lm_head, Dtype::kF16, true});
  }
  std::vector<SafetensorsWriter::Declaration> declarations;
  std::size_t bytes = 0;
  double total = 0;
  for (const Part& part : parts) {
    declarations.push_back({part.name, part.dtype, part.view->shape});
    total += static_cast<double>(part.view->elements());
    bytes += part.view->elements() * dtype_bytes(part.dtype);
  }
  std::map<std::string, std::string, std::less<>> metadata = {
      {"tied_embeddings", tables.tied && !folded ? "true" : "false"}};
  if (folded) metadata["cloak_commitment"] = fingerprint_text(options.commitment);
  auto writer = SafetensorsWriter::create(file, declarations, metadata, folded ? 0600 : 0644);
  if (!writer.ok()) return writer.status();

  TableWriter table_writer(**writer, tables, options, total);
  hash.add(gain.source, *gain.view);
  for (const Part& part : parts) {
    // A model with one table has no tensor of the head's name.
    const bool own = !part.is_head || tables.lm_head.data.data() != tables.embed.data.data();
    absl::Status status;
    tbb::parallel_invoke([&] { status = table_writer.write(part); },
                         [&] {
                           if (own) hash.add(part.source, *part.view);
                         });
    if (!status.ok()) return status;
    model.release_pages(*part.view);
  }
  if (absl::Status status = (*writer)->finish(); !status.ok()) return status;
  return bytes;
}

absl::StatusOr<SelfCheck> check_folded_tables(const std::filesystem::path& file,
                                              const ClientTables& tables,
                                              const Rotation& rotation) {
  constexpr std::size_t kRows = 64, kStates = 4;
  constexpr double kTolerance = 0x1p-8;  // 8 roundings to float16; a wrong fold gives more than 1
  const auto folded = Safetensors::open(file);
  if (!folded.ok()) return folded.status();
  const auto embed = folded->get("embed_tokens.weight", tables.embed.shape);
  const auto head = folded->get("lm_head.weight", tables.lm_head.shape);
  if (!embed.ok()) return embed.status();
  if (!head.ok()) return head.status();

  const std::size_t vocab = tables.embed.shape[0], hidden = tables.embed.shape[1];
  std::vector<float> gain(hidden);
  tables.final_norm.read(0, gain);
  std::mt19937_64 rng(1);
  std::normal_distribution<double> normal;
  std::vector<double> states(kStates * hidden), rotated(states.size());
  for (double& value : states) value = normal(rng);
  rotation.rotate(kStates, std::span<const double>(states), rotated);

  std::vector<double> embeddings, embeddings_off, logits, logits_off, expected(hidden);
  for (std::size_t i = 0; i < kRows; ++i) {
    const std::size_t row = rng() % vocab;
    rotation.rotate(1, std::span<const double>(row_of(tables.embed, row)), expected);
    const std::vector<double> stored = row_of(*embed, row);
    for (std::size_t j = 0; j < hidden; ++j) {
      embeddings.push_back(expected[j]);
      embeddings_off.push_back(stored[j] - expected[j]);
    }
    std::vector<double> plain = row_of(tables.lm_head, row);
    for (std::size_t j = 0; j < hidden; ++j) plain[j] *= gain[j];
    const std::vector<double> folded_row = row_of(*head, row);
    for (std::size_t s = 0; s < kStates; ++s) {
      logits.push_back(dot(plain, &states[s * hidden]));
      logits_off.push_back(dot(folded_row, &rotated[s * hidden]) - logits.back());
    }
  }
  const double error =
      std::max(norm(embeddings_off) / norm(embeddings), norm(logits_off) / norm(logits));
  return SelfCheck{.error = error, .tolerance = kTolerance};
}

}  // namespace infemeral
