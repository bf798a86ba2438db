#include "kernels/client_backend.h"

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "engine/cloak_noise.h"
#include "engine/subset_head.h"
#include "engine/text.h"
#include "engine/token_subset.h"
#include "kernels/cloak.h"
#include "kernels/device.h"
#include "kernels/full_head.h"
#include "kernels/int8_head.h"
#include "kernels/rotate.h"
#include "kernels/sample.h"
#include "kernels/upload.h"
#include "kernels/wire.h"

namespace infemeral {
namespace {

using namespace cuda;

constexpr std::size_t kEmbedRows = 256;  // rows of a prompt in one product
constexpr std::size_t kMaxVocab = std::size_t{1}
                                  << 21;  // kernels/sample.cu adds up so many weights

// What a graph was recorded for.
struct GraphKey {
  int rows;
  WireDtype dtype;
  bool scans;    // a row's sampling needs all intervals
  bool chooses;  // a row is not greedy
  auto operator<=>(const GraphKey&) const = default;
};

class CudaClientBackend final : public ClientBackend {
 public:
  static absl::StatusOr<std::unique_ptr<ClientBackend>> make(ClientFolder& folder,
                                                             const CudaOptions& options,
                                                             CudaMemory memory) {
    std::unique_ptr<CudaClientBackend> backend(new CudaClientBackend(options));
    INFEMERAL_RETURN(backend->load(folder, memory));
    return backend;
  }

  ~CudaClientBackend() override {
    if (!device_.stream) return;
    (void)cudaSetDevice(device_.index);
    (void)cudaStreamSynchronize(device_.stream.get());
  }

  std::string_view name() const override { return name_; }
  std::size_t hidden_size() const override { return hidden_; }
  std::size_t vocab_size() const override { return vocab_; }

  MemoryUse memory() const override {
    MemoryUse use;
    use.weights_bytes = embed_tokens_.bytes() + lm_head_.bytes() + copy_.bytes() + bounds_.bytes() +
                        subset_rows_.bytes() + gain_.bytes();
    if (cloak_) use.cloak_bytes = cloak_->bytes();
    use.device_peak_bytes = usage_.peak;
    return use;
  }

  HeadCounters head_counters() const override { return counters_; }

  absl::Status embed(std::span<const std::int32_t> ids, WireDtype dtype, std::span<std::byte> out,
                     PhaseTimes& times) override {
    return guard([&] { return embed_rows(ids, dtype, out, times); });
  }

  absl::Status next_tokens(std::span<const std::byte> rows, WireDtype dtype,
                           std::span<const SampleRequest> requests, std::span<std::int32_t> tokens,
                           PhaseTimes& times) override {
    return guard([&] { return head_and_sample(rows, dtype, requests, tokens, times); });
  }

  absl::Status logits(std::span<const std::byte> row, WireDtype dtype,
                      std::span<float> logits) override {
    return guard([&] { return compute_logits(row, dtype, logits); });
  }

 private:
  explicit CudaClientBackend(const CudaOptions& options)
      : mode_(options.head), noise_(options.cloak_noise) {}

  // An error of the device is final: what lies on it is not to be trusted any more.
  template <typename Body>
  absl::Status guard(const Body& body) {
    if (!broken_.ok()) return broken_;
    INFEMERAL_CUDA(cudaSetDevice(device_.index));
    absl::Status status = body();
    if (status.code() == absl::StatusCode::kInternal) broken_ = status;
    return status;
  }

  // --- loading ---

  template <typename T>
  absl::Status allocate(Array<T>& array, Place place, std::size_t size) {
    auto made = Array<T>::make(place, size, usage_);
    if (!made.ok()) return made.status();
    array = *std::move(made);
    return absl::OkStatus();
  }

  absl::Status load(ClientFolder& folder, CudaMemory memory) {
    auto device = open_device();
    if (!device.ok()) return device.status();
    device_ = *std::move(device);
    name_ = cat("cuda (", device_.name, memory == CudaMemory::kSplit ? ", split memory)" : ")");
    hidden_ = folder.manifest.hidden_size;
    vocab_ = folder.manifest.vocab_size;
    stride_ = static_cast<std::size_t>(padded(static_cast<int>(hidden_)));
    constexpr std::size_t kReserved = 24 << 10;
    if (stride_ * sizeof(float) + kReserved > device_.stage.shared_bytes || vocab_ > kMaxVocab) {
      return absl::InvalidArgumentError(
          cat("the CUDA backend does not take a model of hidden size ", hidden_, " and ", vocab_,
              " tokens on this GPU; use --backend cpu"));
    }
    std::vector<std::int32_t> subset;
    if (mode_ == HeadMode::kSubset) {
      auto ids = load_token_subset(folder.manifest, folder.path);
      if (!ids.ok()) return ids.status();
      subset = *std::move(ids);
    }
    cublasHandle_t cublas = nullptr;
    INFEMERAL_RETURN(cublas_status(cublasCreate(&cublas), "cublasCreate"));
    cublas_ = Cublas(cublas);
    INFEMERAL_RETURN(
        cublas_status(cublasSetStream(cublas, device_.stage.stream), "cublasSetStream"));

    const Place place = memory == CudaMemory::kSplit ? Place::kPinned : Place::kDevice;
    INFEMERAL_RETURN(load_table(folder.lm_head, place, lm_head_));
    tied_ = folder.lm_head.data.data() == folder.embed_tokens.data.data();
    if (!tied_) INFEMERAL_RETURN(load_table(folder.embed_tokens, place, embed_tokens_));
    if (mode_ == HeadMode::kCertified || mode_ == HeadMode::kInt8) INFEMERAL_RETURN(make_int8());
    if (mode_ == HeadMode::kSubset) INFEMERAL_RETURN(load_subset(folder, std::move(subset)));

    std::vector<float> gain(hidden_);
    folder.final_norm.read(0, gain);
    INFEMERAL_RETURN(allocate(gain_, Place::kDevice, stride_));
    INFEMERAL_CUDA(cudaMemcpyAsync(gain_.data(), gain.data(), gain.size() * sizeof(float),
                                   cudaMemcpyHostToDevice, device_.stage.stream));
    INFEMERAL_RETURN(allocate_buffers());
    INFEMERAL_CUDA(cudaStreamSynchronize(device_.stage.stream));
    INFEMERAL_RETURN(leave_room_for_cloak());
    folder_.emplace(std::move(folder));
    return absl::OkStatus();
  }

  // The cloak is made on first use; that the device is too small for it must show now, when less
  // can still be asked of it.
  absl::Status leave_room_for_cloak() const {
    std::size_t free = 0, total = 0;
    INFEMERAL_CUDA(cudaMemGetInfo(&free, &total));
    // Kept: three matrices in float16. While it is made: one in float64 with its QR's work, and the
    // float32 product that is checked.
    const std::size_t needed = 24 * hidden_ * stride_;
    if (free >= needed) return absl::OkStatus();
    return absl::ResourceExhaustedError(
        cat("the GPU has ", free / 1000000, " MB left where the cloak needs ", needed / 1000000));
  }

  absl::Status load_table(const TensorView& view, Place place, Array<__half>& table) {
    INFEMERAL_RETURN(allocate(table, place, vocab_ * stride_));
    return upload_rows(device_, view.data, vocab_, hidden_, stride_, place, table.data(), usage_);
  }

  absl::Status make_int8() {
    INFEMERAL_RETURN(allocate(copy_, Place::kDevice, int8_rows(vocab_) * stride_));
    INFEMERAL_RETURN(allocate(bounds_, Place::kDevice, int8_rows(vocab_)));
    INFEMERAL_RETURN(allocate(largest_norm_, Place::kDevice, 1));
    INFEMERAL_CUDA(quantise_rows(device_.stage, {.rows = lm_head_.data(),
                                                 .vocab_size = static_cast<int>(vocab_),
                                                 .count = static_cast<int>(vocab_),
                                                 .hidden_size = static_cast<int>(hidden_),
                                                 .stride = static_cast<int>(stride_),
                                                 .copy = copy_.data(),
                                                 .bounds = bounds_.data(),
                                                 .largest_norm = largest_norm_.data()}));
    return absl::OkStatus();
  }

  absl::Status load_subset(const ClientFolder& folder, std::vector<std::int32_t> ids) {
    const std::size_t n = ids.size(), row_bytes = hidden_ * sizeof(__half);
    std::vector<std::byte> rows(n * row_bytes);
    for (std::size_t i = 0; i < n; ++i) {
      std::memcpy(&rows[i * row_bytes],
                  folder.lm_head.data.data() + static_cast<std::size_t>(ids[i]) * row_bytes,
                  row_bytes);
    }
    INFEMERAL_RETURN(allocate(subset_rows_, Place::kDevice, n * stride_));
    INFEMERAL_RETURN(allocate(subset_logits_, Place::kPinned, kMaxRows * score_stride(n)));
    subset_.emplace(std::move(ids), vocab_);
    return upload_rows(device_, rows, n, hidden_, stride_, Place::kDevice, subset_rows_.data(),
                       usage_);
  }

  absl::Status allocate_buffers() {
    const std::size_t s = stride_, k = kMaxRows, scores = score_stride(vocab_);
    const std::size_t wire_bytes = wire_row_bytes(WireDtype::kF32, hidden_);
    seen_words_ = static_cast<int>((vocab_ + 31) / 32);
    const bool certified = mode_ == HeadMode::kCertified;
    for (const auto& [array, size] : {std::pair{&cloaked_, k * s},
                                      {&states_, k * s},
                                      {&residual_, k * s},
                                      {&embedded_, kEmbedRows * s},
                                      {&units_, k},
                                      {&upper_, k * scores},
                                      {&lower_, certified ? k * scores : 0}}) {
      INFEMERAL_RETURN(allocate(*array, Place::kDevice, size));
    }
    INFEMERAL_RETURN(allocate(split_, Place::kDevice, plane_bytes(kMaxRows, 2 * s)));
    INFEMERAL_RETURN(allocate(planes_, Place::kDevice, plane_bytes(kMaxRows, s)));
    INFEMERAL_RETURN(allocate(half_rows_, Place::kDevice, kEmbedRows * s));
    INFEMERAL_RETURN(allocate(row_states_, Place::kDevice, k));
    INFEMERAL_RETURN(allocate(candidates_, Place::kDevice, certified ? k * kMaxCandidates : 0));
    INFEMERAL_RETURN(allocate(tokens_, Place::kDevice, k));
    INFEMERAL_RETURN(allocate(seen_copy_, Place::kDevice, k * seen_words_));
    INFEMERAL_RETURN(allocate(blocks_done_, Place::kDevice, 1));
    INFEMERAL_RETURN(allocate(seen_, Place::kPinned, k * seen_words_));
    INFEMERAL_RETURN(allocate(requests_, Place::kPinned, k));
    INFEMERAL_RETURN(allocate(results_, Place::kPinned, k));
    INFEMERAL_RETURN(allocate(wire_in_, Place::kPinned, k * wire_bytes));
    INFEMERAL_RETURN(allocate(wire_out_, Place::kPinned, kEmbedRows * wire_bytes));
    INFEMERAL_RETURN(allocate(next_row_, Place::kPinned, wire_bytes));
    INFEMERAL_RETURN(allocate(ids_, Place::kPinned, kEmbedRows));
    INFEMERAL_RETURN(allocate(signals_, Place::kPinned, 1));
    return absl::OkStatus();
  }

  absl::Status ensure_cloak() {
    if (cloak_) return absl::OkStatus();
    auto cloak = load_cloak(device_, cublas_, *folder_, usage_);
    if (!cloak.ok()) return cloak.status();
    cloak_.emplace(*std::move(cloak));
    return absl::OkStatus();
  }

  // Tells one call's answers from another's; never 0, which no answer has.
  std::uint32_t next_sequence() {
    if (++sequence_ == 0) ++sequence_;
    return sequence_;
  }

  // --- waiting for the device without a call into the driver ---

  absl::Status wait_for(const std::uint32_t& word, std::uint32_t value) const {
    const std::atomic_ref<const std::uint32_t> flag(word);
    const auto arrived = [&] { return flag.load(std::memory_order_acquire) == value; };
    for (std::uint64_t spins = 1; !arrived(); ++spins) {
      _mm_pause();
      if (spins % 4096 != 0) continue;
      const cudaError_t state = cudaStreamQuery(device_.stage.stream);
      if (state == cudaErrorNotReady) continue;
      if (state != cudaSuccess) return cuda_status(state, "the token's kernels");
      if (!arrived()) return absl::InternalError("the GPU ended without an answer");
    }
    return absl::OkStatus();
  }

  // --- embed, cloak ---

  // x * Q for n embedded rows in split_, encoded to `wire`; `done` receives *sequence at the end.
  absl::Status enqueue_cloak(int n, WireDtype dtype, std::byte* wire, std::uint32_t* done,
                             const std::uint32_t* sequence) {
    INFEMERAL_CUDA(rotate(device_.stage, {.matrix = cloak_->transposed.data(),
                                          .rows = static_cast<int>(hidden_),
                                          .stride = static_cast<int>(stride_),
                                          .states = split(),
                                          .n = n,
                                          .out = embedded_.data()}));
    return enqueue_encode(n, dtype, wire, done, sequence);
  }

  absl::Status enqueue_encode(int n, WireDtype dtype, std::byte* wire, std::uint32_t* done,
                              const std::uint32_t* sequence) {
    if (noise_ > 0) {
      INFEMERAL_CUDA(add_noise(device_.stage, {.rows = embedded_.data(),
                                               .n = n,
                                               .hidden_size = static_cast<int>(hidden_),
                                               .stride = static_cast<int>(stride_),
                                               .level = noise_,
                                               .key = noise_key_,
                                               .sequence = sequence}));
    }
    INFEMERAL_CUDA(encode(device_.stage, {.in = embedded_.data(),
                                          .rows = n,
                                          .hidden_size = static_cast<int>(hidden_),
                                          .stride = static_cast<int>(stride_),
                                          .dtype = dtype,
                                          .wire = wire,
                                          .done = done,
                                          .sequence = sequence,
                                          .finished = blocks_done_.data()}));
    return absl::OkStatus();
  }

  Embed embedding(const std::int32_t* ids, int n) const {
    return {.ids = ids,
            .rows = n,
            .table = tied_ ? lm_head_.data() : embed_tokens_.data(),
            .vocab_size = static_cast<int>(vocab_),
            .stride = static_cast<int>(stride_),
            .split = split()};
  }

  absl::Status enqueue_embed(int n, WireDtype dtype) {
    Embed lookup = embedding(ids_.data(), n);
    lookup.times = signals_[0].lookup;
    if (n <= kMaxRows) {
      INFEMERAL_CUDA(cuda::embed(device_.stage, lookup));
      return enqueue_cloak(n, dtype, wire_out_.data(), &signals_[0].embedded,
                           &signals_[0].sequence);
    }
    lookup.out = half_rows_.data();
    INFEMERAL_CUDA(cuda::embed(device_.stage, lookup));
    // Row-major, cuBLAS sees the transposes: (X Q)^T = Q^T X^T.
    const float one = 1, zero = 0;
    const int h = static_cast<int>(hidden_), stride = static_cast<int>(stride_);
    INFEMERAL_RETURN(cublas_status(
        cublasGemmEx(cublas_.get(), CUBLAS_OP_N, CUBLAS_OP_N, h, n, h, &one, cloak_->rows.data(),
                     CUDA_R_16F, stride, half_rows_.data(), CUDA_R_16F, stride, &zero,
                     embedded_.data(), CUDA_R_32F, stride, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
        "cublasGemmEx"));
    // A kernel of cuBLAS does not let the next one start early.
    Stage stage = device_.stage;
    stage.overlap = false;
    std::swap(stage, device_.stage);
    absl::Status status =
        enqueue_encode(n, dtype, wire_out_.data(), &signals_[0].embedded, &signals_[0].sequence);
    std::swap(stage, device_.stage);
    return status;
  }

  absl::Status embed_rows(std::span<const std::int32_t> ids, WireDtype dtype,
                          std::span<std::byte> out, PhaseTimes& times) {
    const std::size_t row_bytes = wire_row_bytes(dtype, hidden_);
    if (out.size() != ids.size() * row_bytes) {
      return absl::InvalidArgumentError(cat("embed: the output holds ", out.size(), " bytes; ",
                                            ids.size(), " rows need ", ids.size() * row_bytes));
    }
    for (std::size_t i = 0; i < ids.size(); ++i) {
      if (ids[i] < 0 || static_cast<std::size_t>(ids[i]) >= vocab_) {
        return absl::InvalidArgumentError(
            cat("embed: token ", i, " is outside the vocabulary of ", vocab_, " tokens"));
      }
    }
    PhaseClock clock;
    if (ids.size() == 1 && next_ && next_->id == ids[0] && next_->dtype == dtype) {
      clock.lap(times.embed_ms);
      INFEMERAL_RETURN(wait_for(signals_[0].next_row, next_->sequence));
      std::memcpy(out.data(), next_row_.data(), row_bytes);
      clock.lap(times.cloak_ms);
      return absl::OkStatus();
    }
    INFEMERAL_RETURN(ensure_cloak());
    for (std::size_t begin = 0; begin < ids.size(); begin += kEmbedRows) {
      const std::size_t n = std::min(kEmbedRows, ids.size() - begin);
      std::copy_n(ids.begin() + static_cast<std::ptrdiff_t>(begin), n, ids_.data());
      signals_[0].sequence = next_sequence();
      if (n == 1) {
        Graph& graph = embed_graphs_[dtype];
        if (!graph) {
          auto recorded = record(device_.stage, [&] { return enqueue_embed(1, dtype); });
          if (!recorded.ok()) return recorded.status();
          graph = *std::move(recorded);
        }
        INFEMERAL_CUDA(cudaGraphLaunch(graph.get(), device_.stage.stream));
      } else {
        INFEMERAL_RETURN(enqueue_embed(static_cast<int>(n), dtype));
      }
      INFEMERAL_RETURN(wait_for(signals_[0].embedded, sequence_));
      std::memcpy(out.data() + begin * row_bytes, wire_out_.data(), n * row_bytes);
      double all_ms = 0;
      clock.lap(all_ms);
      const auto* lookup = signals_[0].lookup;
      const double lookup_ms = std::min(all_ms, static_cast<double>(lookup[1] - lookup[0]) * 1e-6);
      times.embed_ms += lookup_ms;
      times.cloak_ms += all_ms - lookup_ms;
    }
    return absl::OkStatus();
  }

  // --- decode, uncloak ---

  Split split() const { return {split_.data(), units_.data()}; }

  absl::Status enqueue_uncloak(int n, WireDtype dtype) {
    const Stage& stage = device_.stage;
    const int h = static_cast<int>(hidden_), stride = static_cast<int>(stride_);
    INFEMERAL_CUDA(decode(stage, {.wire = wire_in_.data(),
                                  .requests = requests_.data(),
                                  .seen = seen_.data(),
                                  .seen_copy = seen_copy_.data(),
                                  .seen_words = seen_words_,
                                  .dtype = dtype,
                                  .states = n,
                                  .hidden_size = h,
                                  .stride = stride,
                                  .out = cloaked_.data(),
                                  .split = split(),
                                  .rows = row_states_.data()}));
    Rotate uncloak = {.matrix = cloak_->packed.data(),
                      .rows = h,
                      .stride = stride,
                      .states = split(),
                      .n = n,
                      .out = states_.data(),
                      .gain = gain_.data(),
                      .started = &row_states_.data()->times.uncloak};
    if (dtype != WireDtype::kF32) {
      INFEMERAL_CUDA(rotate(stage, uncloak));
      return absl::OkStatus();
    }
    // One step of iterative refinement, as cpu/client_backend.cpp explains:
    // y = y' Q^T, then y += (y' - y Q) Q^T.
    uncloak.gain = nullptr;
    INFEMERAL_CUDA(rotate(stage, uncloak));
    INFEMERAL_CUDA(split_states(stage, {states_.data(), n, stride, split()}));
    Rotate back = uncloak;
    back.started = nullptr;
    back.matrix = cloak_->transposed.data();
    back.out = residual_.data();
    back.add = cloaked_.data();
    back.sign = -1;
    INFEMERAL_CUDA(rotate(stage, back));
    INFEMERAL_CUDA(split_states(stage, {residual_.data(), n, stride, split()}));
    Rotate correct = uncloak;
    correct.started = nullptr;
    correct.add = states_.data();
    correct.gain = gain_.data();
    INFEMERAL_CUDA(rotate(stage, correct));
    return absl::OkStatus();
  }

  // --- de_embed, sample ---

  FullHead full_product(int first, int n) const {
    return {.lm_head = lm_head_.data(),
            .vocab_size = static_cast<int>(vocab_),
            .stride = static_cast<int>(stride_),
            .states = states_.data() + static_cast<std::size_t>(first) * stride_,
            .n = n,
            .logits = upper_.data(),
            .started = &row_states_.data()->times.de_embed};
  }

  Product int8_product(int n) const {
    return {.states = states_.data(),
            .n = n,
            .hidden_size = static_cast<int>(hidden_),
            .stride = static_cast<int>(stride_),
            .vocab_size = static_cast<int>(vocab_),
            .copy = copy_.data(),
            .bounds = bounds_.data(),
            .largest_norm = largest_norm_.data(),
            .planes = planes_.data(),
            .seen = seen_copy_.data(),
            .seen_words = seen_words_,
            .rows = row_states_.data(),
            .lower = lower_.data(),
            .upper = upper_.data(),
            .approximate = mode_ == HeadMode::kInt8};
  }

  // For rows [first, first + n), whose scores lie at the beginning of upper_ when first > 0.
  Sample sampling(int first, int n) const {
    return {.n = n,
            .vocab_size = static_cast<int>(vocab_),
            .stride = static_cast<int>(stride_),
            .rows = row_states_.data() + first,
            .lower = lower_.data(),
            .upper = upper_.data(),
            .lm_head = lm_head_.data(),
            .states = states_.data(),
            .seen = seen_copy_.data() + static_cast<std::size_t>(first) * seen_words_,
            .seen_words = seen_words_,
            .candidates = candidates_.data(),
            .results = results_.data() + first,
            .tokens = tokens_.data() + first,
            .need_proof = mode_ == HeadMode::kInt8 && first == 0};
  }

  absl::Status enqueue_head(const GraphKey& key) {
    const Stage& stage = device_.stage;
    INFEMERAL_RETURN(enqueue_uncloak(key.rows, key.dtype));
    if (mode_ == HeadMode::kCertified) {
      INFEMERAL_CUDA(int8_head(stage, int8_product(key.rows)));
      if (key.scans) INFEMERAL_CUDA(scan(stage, sampling(0, key.rows)));
      INFEMERAL_CUDA(select(stage, sampling(0, key.rows)));
      if (key.chooses) INFEMERAL_CUDA(choose(stage, sampling(0, key.rows)));
    } else {
      if (mode_ == HeadMode::kInt8) {
        INFEMERAL_CUDA(int8_head(stage, int8_product(key.rows)));
      } else {
        INFEMERAL_CUDA(full_head(stage, full_product(0, key.rows)));
      }
      INFEMERAL_CUDA(choose_full(stage, sampling(0, key.rows)));
    }
    if (key.rows > 1) return absl::OkStatus();
    // The token's own cloaked row, which the next step will ask for.
    INFEMERAL_CUDA(cuda::embed(stage, embedding(tokens_.data(), 1)));
    return enqueue_cloak(1, key.dtype, next_row_.data(), &signals_[0].next_row,
                         &row_states_.data()->request.sequence);
  }

  static Selection selection_of(const SamplingParams& params, std::size_t vocab) {
    if (params.greedy()) return Selection::kGreedy;
    if (params.top_k > 0 && static_cast<std::size_t>(params.top_k) < vocab) return Selection::kTopK;
    if (params.top_p < 1) return Selection::kNucleus;
    return params.min_p > 0 ? Selection::kMinP : Selection::kUnlimited;
  }

  void write_request(int i, const SampleRequest& request) {
    const SamplingParams& params = request.params;
    requests_[i] = {.inverse_temperature = params.greedy() ? 1.0f : 1.0f / params.temperature,
                    .repetition_penalty = params.repetition_penalty,
                    .top_p = params.top_p,
                    .min_p = params.min_p,
                    .top_k = static_cast<std::size_t>(params.top_k) < vocab_ ? params.top_k : 0,
                    .selection = selection_of(params, vocab_),
                    .seed = params.seed,
                    .position = request.position,
                    .sequence = sequence_};
    if (params.repetition_penalty == 1) return;
    std::uint32_t* bits = seen_.data() + static_cast<std::size_t>(i) * seen_words_;
    std::fill_n(bits, seen_words_, 0);
    for (std::int32_t id : request.history) {
      if (id >= 0 && static_cast<std::size_t>(id) < vocab_) bits[id / 32] |= 1u << (id % 32);
    }
  }

  absl::Status head_and_sample(std::span<const std::byte> rows, WireDtype dtype,
                               std::span<const SampleRequest> requests,
                               std::span<std::int32_t> tokens, PhaseTimes& times) {
    const std::size_t row_bytes = wire_row_bytes(dtype, hidden_);
    if (rows.size() != requests.size() * row_bytes || tokens.size() != requests.size()) {
      return absl::InvalidArgumentError(cat("next_tokens: ", requests.size(), " requests need ",
                                            requests.size() * row_bytes, " bytes of rows and ",
                                            requests.size(), " tokens, not ", rows.size(), " and ",
                                            tokens.size()));
    }
    for (const SampleRequest& request : requests) INFEMERAL_RETURN(validate(request.params));
    INFEMERAL_RETURN(ensure_cloak());
    for (std::size_t begin = 0; begin < requests.size(); begin += kMaxRows) {
      const std::size_t m = std::min<std::size_t>(kMaxRows, requests.size() - begin);
      const auto block = rows.subspan(begin * row_bytes, m * row_bytes);
      INFEMERAL_RETURN(mode_ == HeadMode::kSubset
                           ? choose_subset(block, dtype, requests.subspan(begin, m),
                                           tokens.subspan(begin, m), times)
                           : choose_tokens(block, dtype, requests.subspan(begin, m),
                                           tokens.subspan(begin, m), times));
    }
    return absl::OkStatus();
  }

  absl::Status choose_tokens(std::span<const std::byte> rows, WireDtype dtype,
                             std::span<const SampleRequest> requests,
                             std::span<std::int32_t> tokens, PhaseTimes& times) {
    PhaseClock clock;
    const int m = static_cast<int>(requests.size());
    GraphKey key = {.rows = m, .dtype = dtype, .scans = false, .chooses = false};
    next_sequence();
    for (int i = 0; i < m; ++i) {
      write_request(i, requests[i]);
      const Selection selection = requests_[i].selection;
      if (mode_ != HeadMode::kCertified) continue;
      key.scans |= selection != Selection::kGreedy && selection != Selection::kMinP;
      key.chooses |= selection != Selection::kGreedy;
    }
    std::memcpy(wire_in_.data(), rows.data(), rows.size());
    Graph& graph = head_graphs_[key];
    if (!graph) {
      auto recorded = record(device_.stage, [&] { return enqueue_head(key); });
      if (!recorded.ok()) return recorded.status();
      graph = *std::move(recorded);
    }
    next_.reset();
    INFEMERAL_CUDA(cudaGraphLaunch(graph.get(), device_.stage.stream));
    for (int i = 0; i < m; ++i) INFEMERAL_RETURN(wait_for(results_[i].sequence, sequence_));
    add_times(times, clock);

    for (int i = 0; i < m; ++i) {
      const RowResult result = results_[i];
      if (result.outcome == Outcome::kNotFinite) return not_finite();
      const bool certified = mode_ == HeadMode::kCertified;
      if (certified) {
        ++counters_.tokens;
        counters_.rows_rescored += result.rows_rescored;
      }
      if (result.outcome == Outcome::kToken && (!certified || in_range(requests[i].params))) {
        tokens[i] = result.token;
        if (m == 1) next_ = {.id = result.token, .dtype = dtype, .sequence = sequence_};
        continue;
      }
      if (certified) ++counters_.full_passes;
      INFEMERAL_RETURN(run_full(i, tokens[i], times));
    }
    return absl::OkStatus();
  }

  // Scores stay finite, as the proof assumes (engine/certified_head.cpp).
  static bool in_range(const SamplingParams& params) {
    return (params.greedy() || params.temperature >= 1e-4f) && params.repetition_penalty >= 1e-3f;
  }

  static absl::Status not_finite() {
    return absl::DataLossError(
        "the body returned values that are not finite; its weights or its arithmetic are damaged");
  }

  // The full head for row i, whose state and request are on the device.
  absl::Status run_full(int i, std::int32_t& token, PhaseTimes& times) {
    PhaseClock clock;
    std::atomic_ref(results_[i].sequence).store(0);
    Sample sample = sampling(i, 1);
    sample.need_proof = false;
    INFEMERAL_CUDA(full_head(device_.stage, full_product(i, 1)));
    INFEMERAL_CUDA(choose_full(device_.stage, sample));
    INFEMERAL_RETURN(wait_for(results_[i].sequence, requests_[i].sequence));
    clock.lap(times.de_embed_ms);
    if (results_[i].outcome == Outcome::kNotFinite) return not_finite();
    token = results_[i].token;
    return absl::OkStatus();
  }

  // The device's own clock tells the stages apart; what is left of the wall clock's time is
  // bringing the row to the device and the token back.
  void add_times(PhaseTimes& times, PhaseClock& clock) const {
    double all_ms = 0;
    clock.lap(all_ms);
    const StageTimes& t = results_[0].times;
    const auto ms = [](unsigned long long from, unsigned long long to) {
      return to > from ? static_cast<double>(to - from) * 1e-6 : 0.0;
    };
    const double uncloak = ms(t.uncloak, t.de_embed), de_embed = ms(t.de_embed, t.sample),
                 sample = ms(t.sample, t.end);
    times.uncloak_ms += uncloak;
    times.de_embed_ms += de_embed;
    times.sample_ms += sample;
    times.decode_ms += std::max(0.0, all_ms - uncloak - de_embed - sample);
  }

  // --- the subset head: its logits come to the host, which is sure or not ---

  absl::Status enqueue_subset(int n) {
    FullHead product = full_product(0, n);
    product.lm_head = subset_rows_.data();
    product.vocab_size = static_cast<int>(subset_->ids().size());
    product.logits = subset_logits_.data();
    INFEMERAL_CUDA(full_head(device_.stage, product));
    return absl::OkStatus();
  }

  bool all_finite(std::span<const std::byte> row, WireDtype dtype) {
    wire_values_.resize(hidden_);
    decode_wire_row(dtype, row.data(), wire_values_);
    return std::all_of(wire_values_.begin(), wire_values_.end(),
                       [](float x) { return std::isfinite(x); });
  }

  absl::Status choose_subset(std::span<const std::byte> rows, WireDtype dtype,
                             std::span<const SampleRequest> requests,
                             std::span<std::int32_t> tokens, PhaseTimes& times) {
    PhaseClock clock;
    const int m = static_cast<int>(requests.size());
    const std::size_t n = subset_->ids().size(), row_bytes = rows.size() / requests.size();
    next_sequence();
    for (int i = 0; i < m; ++i) {
      if (!all_finite(rows.subspan(i * row_bytes, row_bytes), dtype)) return not_finite();
      write_request(i, requests[i]);
    }
    std::memcpy(wire_in_.data(), rows.data(), rows.size());
    next_.reset();
    INFEMERAL_RETURN(enqueue_uncloak(m, dtype));
    INFEMERAL_CUDA(cudaStreamSynchronize(device_.stage.stream));
    clock.lap(times.uncloak_ms);
    INFEMERAL_RETURN(enqueue_subset(m));
    INFEMERAL_CUDA(cudaStreamSynchronize(device_.stage.stream));
    clock.lap(times.de_embed_ms);
    for (int i = 0; i < m; ++i) {
      const std::optional<std::int32_t> token =
          subset_->sample({&subset_logits_[i * score_stride(n)], n}, requests[i]);
      clock.lap(times.sample_ms);
      ++counters_.tokens;
      if (token) {
        ++counters_.subset_hits;
        tokens[i] = *token;
        continue;
      }
      ++counters_.full_passes;
      INFEMERAL_RETURN(run_full(i, tokens[i], times));
      clock = {};
    }
    return absl::OkStatus();
  }

  // --- logits, for tests and evaluation ---

  absl::Status compute_logits(std::span<const std::byte> row, WireDtype dtype,
                              std::span<float> logits) {
    if (row.size() != wire_row_bytes(dtype, hidden_) || logits.size() != vocab_) {
      return absl::InvalidArgumentError(cat("logits: one row of ", wire_row_bytes(dtype, hidden_),
                                            " bytes gives ", vocab_, " logits, not ", row.size(),
                                            " and ", logits.size()));
    }
    if (!all_finite(row, dtype)) return not_finite();
    INFEMERAL_RETURN(ensure_cloak());
    const cudaStream_t stream = device_.stage.stream;
    next_sequence();
    write_request(0, {});
    std::memcpy(wire_in_.data(), row.data(), row.size());
    next_.reset();
    INFEMERAL_RETURN(enqueue_uncloak(1, dtype));
    bool covered = false;
    if (mode_ == HeadMode::kInt8) {
      INFEMERAL_CUDA(int8_head(device_.stage, int8_product(1)));
      RowState state;
      INFEMERAL_CUDA(cudaMemcpyAsync(&state, row_states_.data(), sizeof state,
                                     cudaMemcpyDeviceToHost, stream));
      INFEMERAL_CUDA(cudaStreamSynchronize(stream));
      covered = state.covered != 0;
    }
    if (!covered) INFEMERAL_CUDA(full_head(device_.stage, full_product(0, 1)));
    if (mode_ == HeadMode::kSubset) INFEMERAL_RETURN(enqueue_subset(1));
    INFEMERAL_CUDA(cudaMemcpyAsync(logits.data(), upper_.data(), logits.size_bytes(),
                                   cudaMemcpyDeviceToHost, stream));
    INFEMERAL_CUDA(cudaStreamSynchronize(stream));
    if (mode_ == HeadMode::kSubset) restrict_to_subset(logits);
    return absl::OkStatus();
  }

  // Minus infinity outside the subset where a plain greedy request would be accepted.
  void restrict_to_subset(std::span<float> logits) {
    const std::span<const float> inside(subset_logits_.data(), subset_->ids().size());
    if (subset_confidence(inside, {}) < kSubsetConfidence) return;
    std::fill(logits.begin(), logits.end(), -std::numeric_limits<float>::infinity());
    for (std::size_t i = 0; i < inside.size(); ++i) {
      logits[static_cast<std::size_t>(subset_->ids()[i])] = inside[i];
    }
  }

  // What the device tells the host beside the results; pinned.
  struct Signals {
    std::uint32_t sequence;  // of the embedding that is under way
    std::uint32_t embedded;  // sequence of the last one that is done
    std::uint32_t next_row;  // sequence of the token whose cloaked row is in next_row_
    unsigned long long lookup[2];
  };
  struct NextRow {
    std::int32_t id;
    WireDtype dtype;
    std::uint32_t sequence;
  };

  const HeadMode mode_;
  const float noise_;
  const std::uint64_t noise_key_ = random_noise_key();
  DeviceUsage usage_;  // before everything that reports to it
  Device device_;
  std::string name_;
  std::optional<ClientFolder> folder_;  // for the cloak
  std::size_t hidden_ = 0, vocab_ = 0, stride_ = 0;
  bool tied_ = false;
  int seen_words_ = 0;
  std::uint32_t sequence_ = 0;
  absl::Status broken_;
  Cublas cublas_;

  // Weights: V x stride in float16, on the device or pinned; the int8 copy and its bounds.
  Array<__half> embed_tokens_;  // empty when tied
  Array<__half> lm_head_;
  Array<std::byte> copy_;
  Array<RowBound> bounds_;
  Array<float> largest_norm_;
  Array<float> gain_;
  Array<__half> subset_rows_;
  std::optional<SubsetSampler> subset_;
  std::optional<DeviceCloak> cloak_;

  // Rows of one call on the device.
  Array<float> cloaked_, states_, residual_, embedded_, units_, lower_, upper_;
  Array<std::byte> split_, planes_;
  Array<__half> half_rows_;
  Array<RowState> row_states_;
  Array<ScoredToken> candidates_;
  Array<std::int32_t> tokens_;
  Array<std::uint32_t> seen_copy_, blocks_done_;

  // Pinned: what crosses the bus.
  Array<std::uint32_t> seen_;
  Array<RowRequest> requests_;
  Array<RowResult> results_;
  Array<std::byte> wire_in_, wire_out_, next_row_;
  Array<std::int32_t> ids_;
  Array<Signals> signals_;
  Array<float> subset_logits_;

  std::optional<NextRow> next_;
  std::map<GraphKey, Graph> head_graphs_;
  std::map<WireDtype, Graph> embed_graphs_;
  std::vector<float> wire_values_;
  HeadCounters counters_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<ClientBackend>> make_cuda_client_backend(ClientFolder folder,
                                                                        const CudaOptions& options,
                                                                        const LogSink& log) {
  const CudaMemory first =
      options.memory == CudaMemory::kSplit ? CudaMemory::kSplit : CudaMemory::kFull;
  auto backend = CudaClientBackend::make(folder, options, first);
  if (backend.ok() || options.memory != CudaMemory::kAuto ||
      backend.status().code() != absl::StatusCode::kResourceExhausted) {
    return backend;
  }
  log_to(log, LogLevel::kWarning,
         cat("the GPU cannot hold all weights (", std::string(backend.status().message()),
             "); float16 rows stay in host memory"));
  return CudaClientBackend::make(folder, options, CudaMemory::kSplit);
}

}  // namespace infemeral
