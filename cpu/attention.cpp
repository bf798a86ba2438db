#include "cpu/attention.h"

#include <algorithm>
#include <cmath>

namespace infemeral {
namespace {

// Rows of one head in a task: whole tiles of every kernel, and scores that stay in the second-level
// cache up to a few thousand positions.
constexpr std::size_t kTaskRows = 24;

}  // namespace

Attention::Attention(const ModelConfig& config, const simd::Kernels& kernels, ThreadPool& pool)
    : config_(config),
      kernels_(kernels),
      pool_(pool),
      scores_(static_cast<std::size_t>(pool.threads())) {}

void Attention::plan(const std::vector<Segment>& segments) {
  segments_ = segments;
  tasks_.clear();
  work_ = 0;
  const std::size_t group = config_.n_heads / config_.n_kv_heads;
  const auto single = static_cast<std::size_t>(std::count_if(
      segments.begin(), segments.end(), [](const Segment& s) { return s.rows == 1; }));
  // A single row reads its keys once for all heads that share them, unless that leaves threads
  // idle.
  const std::size_t groups = single * config_.n_kv_heads;
  const auto threads = static_cast<std::size_t>(pool_.threads());
  const std::size_t heads = groups % threads == 0 || groups >= 4 * threads ? group : 1;
  for (const Segment& s : segments_) {
    work_ += s.rows * (s.position + s.rows) * config_.n_heads * config_.head_dim * 2;
    if (s.rows == 1) {
      for (std::size_t head = 0; head < config_.n_heads; head += heads) {
        tasks_.push_back({&s, 0, 1, head, heads});
      }
      continue;
    }
    for (std::size_t head = 0; head < config_.n_heads; ++head) {
      for (std::size_t row = 0; row < s.rows; row += kTaskRows) {
        tasks_.push_back({&s, row, std::min(kTaskRows, s.rows - row), head, 1});
      }
    }
  }
}

void Attention::run(std::size_t layer, const Rows& queries, const Rows& out) {
  if (tasks_.empty()) return;
  const std::size_t grain = linear_grain(1, work_ / tasks_.size());
  pool_.for_ranges(tasks_.size(), grain, 1, [&](const Range& range) {
    for (std::size_t i = range.begin; i < range.end; ++i) {
      run_task(tasks_[i], layer, queries, out, scores_[range.worker]);
    }
  });
}

void Attention::run_task(const Task& task, std::size_t layer, const Rows& queries, const Rows& out,
                         std::vector<float>& buffer) const {
  const Segment& s = *task.segment;
  const std::size_t d = config_.head_dim;
  const std::size_t kv_head = task.head / (config_.n_heads / config_.n_kv_heads);
  const std::size_t first_row = s.row + task.row, first_position = s.position + task.row;

  // The same loops serve rows of one head (m rows, one position further each) and heads of one row.
  const bool is_group = task.rows == 1;
  const std::size_t m = is_group ? task.heads : task.rows;
  const std::size_t position_step = is_group ? 0 : 1;
  const Rows q{queries[first_row] + task.head * d, is_group ? d : queries.stride};
  const Rows result{out[first_row] + task.head * d, is_group ? d : out.stride};

  const bool windowed = config_.sliding_window > 0 && layer >= config_.sliding_from_layer;
  const auto oldest_seen = [&](std::size_t position) {
    return windowed && position >= config_.sliding_window ? position - config_.sliding_window + 1
                                                          : std::size_t{0};
  };
  const std::size_t end = first_position + (m - 1) * position_step + 1;
  const std::size_t first_page = oldest_seen(first_position) / kPagePositions;
  const std::size_t base = first_page * kPagePositions;
  const std::size_t width = end - base;
  if (buffer.size() < m * width) buffer.resize(m * width);
  const Rows scores{buffer.data(), width};
  const auto format = static_cast<std::size_t>(s.cache->format());

  for (std::size_t page = first_page; page * kPagePositions < end; ++page) {
    const std::size_t from = page * kPagePositions;
    kernels_.matmul[format]({.a = q.data,
                             .lda = q.stride,
                             .w = s.cache->keys(page, layer, kv_head),
                             .ldw = d,
                             .c = scores.data + (from - base),
                             .ldc = scores.stride,
                             .m = m,
                             .n = std::min(kPagePositions, end - from),
                             .k = d});
  }

  // Positions that a row does not see get the weight 0, which adds nothing to its sums.
  const float scale = 1.0f / std::sqrt(static_cast<float>(d));
  for (std::size_t i = 0; i < m; ++i) {
    const std::size_t position = first_position + i * position_step;
    const std::size_t from = oldest_seen(position) - base, to = position + 1 - base;
    std::fill(scores[i], scores[i] + from, 0.0f);
    std::fill(scores[i] + to, scores[i] + width, 0.0f);
    const float inverse = 1.0f / kernels_.softmax(scores[i] + from, to - from, scale);
    for (std::size_t t = from; t < to; ++t) scores[i][t] *= inverse;
    std::fill(result[i], result[i] + d, 0.0f);
  }

  for (std::size_t page = first_page; page * kPagePositions < end; ++page) {
    const std::size_t from = page * kPagePositions;
    kernels_.accumulate[format]({.a = scores.data + (from - base),
                                 .lda = scores.stride,
                                 .w = s.cache->values(page, layer, kv_head),
                                 .ldw = d,
                                 .c = result.data,
                                 .ldc = result.stride,
                                 .m = m,
                                 .n = d,
                                 .k = std::min(kPagePositions, end - from)});
  }
}

}  // namespace infemeral
