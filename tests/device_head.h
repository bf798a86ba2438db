// The certified head on the device, called kernel by kernel as kernels/client_backend.cpp does, for
// the small problems of tests/head_problems.h. What the kernels write is poisoned first.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <catch2/catch.hpp>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "kernels/device.h"
#include "kernels/full_head.h"
#include "kernels/int8_head.h"
#include "kernels/sample.h"
#include "kernels/wire.h"
#include "tests/head_problems.h"

namespace infemeral {

inline void check(cudaError_t error, const char* what) {
  INFO(what << ": " << cudaGetErrorString(error));
  REQUIRE(error == cudaSuccess);
}

// The states of one call, n x H, and what is asked about each.
struct Batch {
  std::vector<float> states;
  std::vector<SampleRequest> requests;  // histories point to `history`
  std::vector<std::int32_t> history;
  int n() const { return static_cast<int>(requests.size()); }
};

struct Answers {
  std::vector<cuda::RowResult> certified, full;
  std::vector<float> lower, upper, logits;  // n x score_stride(V)
  std::vector<cuda::RowState> rows;         // behind the product
};

// lm_head on the device and everything between states and tokens, for any problem up to a size.
class DeviceHead {
 public:
  DeviceHead(cuda::Device device, std::size_t max_vocab, std::size_t max_hidden)
      : device_(std::move(device)), max_vocab_(max_vocab), max_hidden_(max_hidden) {
    const std::size_t k = cuda::kMaxRows, v = cuda::int8_rows(max_vocab),
                      s = static_cast<std::size_t>(cuda::padded(static_cast<int>(max_hidden)));
    make(cuda::Place::kDevice, lm_head_, v * s);
    make(cuda::Place::kDevice, copy_, v * s);
    make(cuda::Place::kDevice, bounds_, v);
    make(cuda::Place::kDevice, largest_norm_, 1);
    make(cuda::Place::kDevice, cloaked_, k * s);
    make(cuda::Place::kDevice, states_, k * s);
    make(cuda::Place::kDevice, planes_, cuda::plane_bytes(cuda::kMaxRows, s));
    make(cuda::Place::kDevice, split_planes_, cuda::plane_bytes(cuda::kMaxRows, 2 * s));
    make(cuda::Place::kDevice, units_, k);
    make(cuda::Place::kDevice, rows_, k);
    make(cuda::Place::kDevice, lower_, k * v);
    make(cuda::Place::kDevice, upper_, k * v);
    make(cuda::Place::kDevice, candidates_, k * cuda::kMaxCandidates);
    make(cuda::Place::kDevice, tokens_, k);
    make(cuda::Place::kDevice, seen_copy_, k * (v / 32));
    make(cuda::Place::kPinned, seen_, k * (v / 32));
    make(cuda::Place::kPinned, requests_, k);
    make(cuda::Place::kPinned, results_, k);
    make(cuda::Place::kPinned, wire_,
         k * s * 2);  // stays zero: states are written where they are read
    poison(seen_copy_);
  }

  // Rows of `halves`; rounded in two calls now and then, as a large matrix is.
  void load(const Problem& p) {
    REQUIRE((p.vocab <= max_vocab_ && p.hidden <= max_hidden_));
    vocab_ = static_cast<int>(p.vocab);
    hidden_ = static_cast<int>(p.hidden);
    stride_ = cuda::padded(hidden_);
    std::vector<std::uint16_t> rows(p.vocab * stride_);
    for (std::size_t i = 0; i < p.vocab; ++i) {
      std::copy_n(&p.halves[i * p.hidden], p.hidden, &rows[i * stride_]);
    }
    put(lm_head_.data(), rows.data(), rows.size() * 2);
    poison(copy_);
    poison(bounds_);
    check(cudaMemsetAsync(largest_norm_.data(), 0, sizeof(float), stream()), "memset");
    const bool twice = vocab_ > cuda::kGroupRows && random_index(2) == 0;
    const int cut = twice ? cuda::kGroupRows : vocab_;
    for (int first = 0; first < vocab_; first += cut) {
      check(cuda::quantise_rows(device_.stage,
                                {.rows = lm_head_.data() + std::size_t(first) * stride_,
                                 .vocab_size = vocab_,
                                 .first = first,
                                 .count = std::min(cut, vocab_ - first),
                                 .hidden_size = hidden_,
                                 .stride = stride_,
                                 .copy = copy_.data(),
                                 .bounds = bounds_.data(),
                                 .largest_norm = largest_norm_.data()}),
            "quantise_rows");
    }
    wait();
  }

  // decode, product, scan, select and choose as the backend does; then the full head.
  Answers run(const Batch& batch) {
    const std::size_t n = batch.requests.size(), scores = n * cuda::score_stride(vocab_);
    const bool scans = std::any_of(requests_.data(), requests_.data() + write(batch), [](auto& r) {
      return r.selection != cuda::Selection::kGreedy && r.selection != cuda::Selection::kMinP;
    });
    const bool chooses = std::any_of(requests_.data(), requests_.data() + n, [](auto& r) {
      return r.selection != cuda::Selection::kGreedy;
    });
    begin(batch);
    product(batch.n(), false);
    Answers answers;
    answers.rows = take(rows_, n);
    answers.lower = take(lower_, scores);
    answers.upper = take(upper_, scores);
    if (scans) check(cuda::scan(device_.stage, sampling(batch.n())), "scan");
    check(cuda::select(device_.stage, sampling(batch.n())), "select");
    if (chooses) check(cuda::choose(device_.stage, sampling(batch.n())), "choose");
    answers.certified = finish(n);

    check(cuda::full_head(device_.stage, {.lm_head = lm_head_.data(),
                                          .vocab_size = vocab_,
                                          .stride = stride_,
                                          .states = states_.data(),
                                          .n = batch.n(),
                                          .logits = upper_.data()}),
          "full_head");
    answers.logits = take(upper_, scores);
    check(cuda::choose_full(device_.stage, sampling(batch.n())), "choose_full");
    answers.full = finish(n);
    return answers;
  }

  // The logits that the product stands for, n x score_stride(V).
  std::vector<float> approximate(const Batch& batch) {
    write(batch);
    begin(batch);
    product(batch.n(), true);
    return take(upper_, batch.requests.size() * cuda::score_stride(vocab_));
  }

  std::vector<RowBound> row_bounds() { return take(bounds_, cuda::int8_rows(vocab_)); }
  float largest_norm() { return take(largest_norm_, 1)[0]; }
  std::size_t score_stride() const { return cuda::score_stride(vocab_); }

  // The int8 copy, row-major with the stride; kernels/int8_head.h draws how it lies.
  std::vector<std::int8_t> copied_rows() {
    const std::size_t v = cuda::int8_rows(vocab_), s = stride_, tiles = v / 16;
    const std::vector<std::byte> bytes = take(copy_, v * s);
    std::vector<std::int8_t> rows(v * s);
    for (std::size_t row = 0; row < v; ++row) {
      for (std::size_t column = 0; column < s; ++column) {
        const std::size_t chunk = column / 256, block = column / 64 % 4;
        const std::size_t blocks = std::min<std::size_t>(4, s / 64 - chunk * 4);
        const std::size_t at = chunk * tiles * 4096 + row / 16 * blocks * 1024 + block * 1024 +
                               row % 16 / 8 * 512 + (row % 8 * 4 + column / 16 % 4) * 16 +
                               column % 16;
        rows[row * s + column] = static_cast<std::int8_t>(bytes[at]);
      }
    }
    return rows;
  }

  // The whole numbers of state i of n that the last product was taken with; not for n = 1, whose
  // planes never leave the multiprocessors.
  std::vector<int> whole_state(int n, int i) {
    const std::vector<std::byte> bytes =
        take(planes_, cuda::plane_bytes(n, static_cast<std::size_t>(stride_)));
    std::vector<int> v;
    for (int j = 0; j < stride_; ++j) {
      const auto at = [&](int plane) {
        const auto offset = cuda::plane_offset(cuda::column_groups(n), i, plane, j);
        return static_cast<int>(static_cast<std::int8_t>(bytes[offset]));
      };
      v.push_back(256 * at(0) + at(1));
    }
    return v;
  }

 private:
  cudaStream_t stream() const { return device_.stage.stream; }
  void wait() { check(cudaStreamSynchronize(stream()), "the kernels"); }

  template <typename T>
  void make(cuda::Place place, cuda::Array<T>& array, std::size_t size) {
    auto made = cuda::Array<T>::make(place, size, usage_);
    INFO(made.status().message());
    REQUIRE(made.ok());
    array = *std::move(made);
  }
  template <typename T>
  void poison(const cuda::Array<T>& array) {  // NaN, as floats
    check(cudaMemsetAsync(array.data(), 0xff, array.bytes(), stream()), "memset");
  }
  void put(void* to, const void* from, std::size_t bytes) {
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream()), "copy");
    wait();
  }
  template <typename T>
  std::vector<T> take(const cuda::Array<T>& array, std::size_t n) {
    std::vector<T> values(n);
    check(cudaMemcpyAsync(values.data(), array.data(), n * sizeof(T), cudaMemcpyDefault, stream()),
          "copy");
    wait();
    return values;
  }

  int seen_words() const { return (vocab_ + 31) / 32; }

  // Requests as kernels/client_backend.cpp writes them; how many they are.
  std::size_t write(const Batch& batch) {
    ++sequence_;
    for (int i = 0; i < batch.n(); ++i) {
      const SampleRequest& request = batch.requests[static_cast<std::size_t>(i)];
      const SamplingParams& params = request.params;
      const bool top_k = params.top_k > 0 && params.top_k < vocab_;
      requests_[i] = {.inverse_temperature = params.greedy() ? 1.0f : 1.0f / params.temperature,
                      .repetition_penalty = params.repetition_penalty,
                      .top_p = params.top_p,
                      .min_p = params.min_p,
                      .top_k = top_k ? params.top_k : 0,
                      .selection = params.greedy()    ? cuda::Selection::kGreedy
                                   : top_k            ? cuda::Selection::kTopK
                                   : params.top_p < 1 ? cuda::Selection::kNucleus
                                   : params.min_p > 0 ? cuda::Selection::kMinP
                                                      : cuda::Selection::kUnlimited,
                      .seed = params.seed,
                      .position = request.position,
                      .sequence = sequence_};
      std::uint32_t* bits = seen_.data() + i * seen_words();
      std::fill_n(bits, seen_words(), 0);
      for (std::int32_t id : batch.history) bits[id / 32] |= 1u << (id % 32);
    }
    return batch.requests.size();
  }

  // Poisons what the kernels write, puts the states where the cloak's product would, and decodes.
  void begin(const Batch& batch) {
    std::vector<float> padded(batch.requests.size() * stride_);
    for (std::size_t i = 0; i < batch.requests.size(); ++i) {
      std::copy_n(&batch.states[i * hidden_], hidden_, &padded[i * stride_]);
    }
    put(states_.data(), padded.data(), padded.size() * sizeof(float));
    poison(planes_);
    poison(rows_);
    poison(lower_);
    poison(upper_);
    poison(candidates_);
    check(cuda::decode(device_.stage, {.wire = wire_.data(),
                                       .requests = requests_.data(),
                                       .seen = seen_.data(),
                                       .seen_copy = seen_copy_.data(),
                                       .seen_words = seen_words(),
                                       .dtype = WireDtype::kF16,
                                       .states = batch.n(),
                                       .hidden_size = hidden_,
                                       .stride = stride_,
                                       .out = cloaked_.data(),
                                       .split = {split_planes_.data(), units_.data()},
                                       .rows = rows_.data()}),
          "decode");
  }

  void product(int n, bool approximate) {
    check(cuda::int8_head(device_.stage, {.states = states_.data(),
                                          .n = n,
                                          .hidden_size = hidden_,
                                          .stride = stride_,
                                          .vocab_size = vocab_,
                                          .copy = copy_.data(),
                                          .bounds = bounds_.data(),
                                          .largest_norm = largest_norm_.data(),
                                          .planes = planes_.data(),
                                          .seen = seen_copy_.data(),
                                          .seen_words = seen_words(),
                                          .rows = rows_.data(),
                                          .lower = lower_.data(),
                                          .upper = upper_.data(),
                                          .approximate = approximate}),
          "int8_head");
  }

  cuda::Sample sampling(int n) const {
    return {.n = n,
            .vocab_size = vocab_,
            .stride = stride_,
            .rows = rows_.data(),
            .lower = lower_.data(),
            .upper = upper_.data(),
            .lm_head = lm_head_.data(),
            .states = states_.data(),
            .seen = seen_copy_.data(),
            .seen_words = seen_words(),
            .candidates = candidates_.data(),
            .results = results_.data(),
            .tokens = tokens_.data()};
  }

  std::vector<cuda::RowResult> finish(std::size_t n) {
    const std::vector<std::int32_t> tokens = take(tokens_, n);
    std::vector<cuda::RowResult> results(results_.data(), results_.data() + n);
    for (std::size_t i = 0; i < n; ++i) {
      REQUIRE(results[i].sequence == sequence_);
      REQUIRE(results[i].token == tokens[i]);  // what the next embedding reads
      results_[i] = {.token = -1, .sequence = 0};
    }
    return results;
  }

  cuda::Device device_;
  cuda::DeviceUsage usage_;
  const std::size_t max_vocab_, max_hidden_;
  int vocab_ = 0, hidden_ = 0, stride_ = 0;
  std::uint32_t sequence_ = 0;
  cuda::Array<__half> lm_head_;
  cuda::Array<std::byte> copy_, planes_, split_planes_, wire_;
  cuda::Array<RowBound> bounds_;
  cuda::Array<float> largest_norm_, cloaked_, states_, units_, lower_, upper_;
  cuda::Array<cuda::RowState> rows_;
  cuda::Array<cuda::ScoredToken> candidates_;
  cuda::Array<std::int32_t> tokens_;
  cuda::Array<std::uint32_t> seen_copy_, seen_;
  cuda::Array<cuda::RowRequest> requests_;
  cuda::Array<cuda::RowResult> results_;
};

}  // namespace infemeral
