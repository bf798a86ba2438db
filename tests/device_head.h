// The certified head on the device, called kernel by kernel as kernels/client_stages.cpp does, for
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
#include "tests/head_kernels.h"
#include "tests/head_problems.h"

namespace infemeral {

// The states of one call, n x H, and what is asked about each.
struct Batch {
  std::vector<float> states;
  std::vector<SampleRequest> requests;  // histories point to `history`
  std::vector<std::int32_t> history;
  int n() const { return static_cast<int>(requests.size()); }
};

struct Answers {
  std::vector<cuda::RowResult> certified, known, full;
  std::vector<float> lower, upper, logits;  // n x score_stride(V)
  std::vector<cuda::RowState> rows;         // behind the product
};

// lm_head on the device and everything between states and tokens, for any problem up to a size.
class DeviceHead {
 public:
  DeviceHead(cuda::Device device, std::size_t max_vocab, std::size_t max_hidden)
      : device_(std::move(device)),
        max_vocab_(max_vocab),
        max_hidden_(max_hidden),
        kernels_(device_.stage, max_vocab, max_hidden) {
    poison(kernels_.buffers.seen);
  }

  // Rows of `halves`; rounded in two calls now and then, as a large matrix is.
  void load(const Problem& p) {
    REQUIRE((p.vocab <= max_vocab_ && p.hidden <= max_hidden_));
    kernels_.reshape(static_cast<int>(p.vocab), static_cast<int>(p.hidden));
    std::vector<std::uint16_t> rows(p.vocab * shape().stride);
    for (std::size_t i = 0; i < p.vocab; ++i) {
      std::copy_n(&p.halves[i * p.hidden], p.hidden, &rows[i * shape().stride]);
    }
    put(kernels_.weights.lm_head.data(), rows.data(), rows.size() * 2);
    poison(kernels_.weights.copy);
    poison(kernels_.weights.bounds);
    const bool twice = shape().vocab_size > cuda::kGroupRows && random_index(2) == 0;
    kernels_.quantise_rows(twice ? cuda::kGroupRows : shape().vocab_size);
    kernels_.wait();
  }

  // decode, product, scan, select and choose as the backend does; then the full head, once with the
  // candidates' kernels, once with every token as a candidate.
  Answers run(const Batch& batch) {
    const int n = batch.n();
    const std::size_t scores = n * score_stride();
    write(batch);
    const auto any = [&](auto is) {
      return std::any_of(kernels_.requests.data(), kernels_.requests.data() + n,
                         [&](auto& request) { return is(request.selection); });
    };
    using cuda::Selection;
    const bool scans = any(cuda::needs_scan);
    const bool chooses = any([](Selection s) { return s != Selection::kGreedy; });
    begin(batch);
    kernels_.int8_head(n);
    Answers answers;
    answers.rows = take(kernels_.buffers.rows, n);
    answers.lower = take(kernels_.buffers.lower, scores);
    answers.upper = take(kernels_.buffers.upper, scores);
    if (scans) kernels_.scan(n);
    kernels_.select(n, chooses);
    answers.certified = finish(n);

    kernels_.forget_candidates(n);
    poison(kernels_.buffers.candidates);
    kernels_.full_head(n);
    answers.logits = take(kernels_.buffers.upper, scores);
    kernels_.score_logits(n);
    if (scans) kernels_.scan(n, true);
    kernels_.select(n, chooses, true);
    answers.known = finish(n);

    put(kernels_.buffers.upper.data(), answers.logits.data(), scores * sizeof(float));
    kernels_.choose_full(n);
    answers.full = finish(n);
    return answers;
  }

  // The logits that the product stands for, n x score_stride(V).
  std::vector<float> approximate(const Batch& batch) {
    write(batch);
    begin(batch);
    kernels_.int8_head(batch.n(), true);
    return take(kernels_.buffers.upper, batch.n() * score_stride());
  }

  std::vector<RowBound> row_bounds() {
    return take(kernels_.weights.bounds, cuda::int8_rows(shape().vocab()));
  }
  float largest_norm() { return take(kernels_.weights.largest_norm, 1)[0]; }
  std::size_t score_stride() const { return cuda::score_stride(shape().vocab()); }

  // The int8 copy, row-major with the stride; kernels/int8_head.h draws how it lies.
  std::vector<std::int8_t> copied_rows() {
    const std::size_t v = cuda::int8_rows(shape().vocab()), s = shape().stride, tiles = v / 16;
    const std::vector<std::byte> bytes = take(kernels_.weights.copy, v * s);
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
        take(kernels_.buffers.planes, cuda::plane_bytes(n, shape().stride));
    const auto offset_of = cuda::warpgroup_products(kernels_.stage, n)
                               ? cuda::warpgroup_plane_offset
                               : cuda::plane_offset;
    std::vector<int> v;
    for (int j = 0; j < shape().stride; ++j) {
      const auto at = [&](int plane) {
        const auto offset = offset_of(cuda::column_groups(n), i, plane, j);
        return static_cast<int>(static_cast<std::int8_t>(bytes[offset]));
      };
      v.push_back(256 * at(0) + at(1));
    }
    return v;
  }

 private:
  cudaStream_t stream() const { return kernels_.stage.stream; }
  const cuda::ClientShape& shape() const { return kernels_.shape; }

  template <typename T>
  void poison(const cuda::Array<T>& array) {  // NaN, as floats
    check(cudaMemsetAsync(array.data(), 0xff, array.bytes(), stream()), "memset");
  }
  void put(void* to, const void* from, std::size_t bytes) {
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream()), "copy");
    kernels_.wait();
  }
  template <typename T>
  std::vector<T> take(const cuda::Array<T>& array, std::size_t n) {
    std::vector<T> values(n);
    check(cudaMemcpyAsync(values.data(), array.data(), n * sizeof(T), cudaMemcpyDefault, stream()),
          "copy");
    kernels_.wait();
    return values;
  }

  void write(const Batch& batch) {
    ++sequence_;
    for (int i = 0; i < batch.n(); ++i) {
      SampleRequest request = batch.requests[static_cast<std::size_t>(i)];
      request.history = batch.history;
      kernels_.write_request(i, request, sequence_);
    }
  }

  // Poisons what the kernels write, puts the states where the cloak's product would, and decodes
  // rows of zeros.
  void begin(const Batch& batch) {
    const std::size_t n = batch.requests.size(), stride = shape().stride, hidden = shape().hidden();
    std::vector<float> padded(n * stride);
    for (std::size_t i = 0; i < n; ++i) {
      std::copy_n(&batch.states[i * hidden], hidden, &padded[i * stride]);
    }
    put(kernels_.buffers.states.data(), padded.data(), padded.size() * sizeof(float));
    poison(kernels_.buffers.planes);
    poison(kernels_.buffers.rows);
    poison(kernels_.buffers.lower);
    poison(kernels_.buffers.upper);
    poison(kernels_.buffers.candidates);
    kernels_.decode(batch.n());
  }

  std::vector<cuda::RowResult> finish(std::size_t n) {
    const std::vector<std::int32_t> tokens = take(kernels_.buffers.tokens, n);
    std::vector<cuda::RowResult> results(kernels_.results.data(), kernels_.results.data() + n);
    for (std::size_t i = 0; i < n; ++i) {
      REQUIRE(results[i].sequence == sequence_);
      REQUIRE(results[i].token == tokens[i]);  // what the next embedding reads
      kernels_.results[i] = {.token = -1, .sequence = 0};
    }
    return results;
  }

  cuda::Device device_;
  const std::size_t max_vocab_, max_hidden_;
  std::uint32_t sequence_ = 0;
  HeadKernels kernels_;
};

}  // namespace infemeral
