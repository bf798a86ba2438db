// Causal attention of rows of queries over the paged keys and values of their sessions.
#pragma once

#include <cstddef>
#include <vector>

#include "cpu/kv_cache.h"
#include "cpu/linear.h"
#include "cpu/parallel.h"
#include "cpu/simd/kernels.h"
#include "engine/model_config.h"

namespace infemeral {

// Consecutive rows of one session inside a batch.
struct Segment {
  KvCache* cache = nullptr;
  std::size_t row = 0;  // in the batch
  std::size_t rows = 0;
  std::size_t position = 0;  // of the first row
};

class Attention {
 public:
  // Keeps references to all three.
  Attention(const ModelConfig& config, const simd::Kernels& kernels, ThreadPool& pool);

  // Cuts the work on these segments into tasks, which run() uses for every layer until the next
  // call.
  void plan(const std::vector<Segment>& segments);

  // out row r, head h = softmax(q . keys / sqrt(head_dim)) * values over the positions that row r
  // sees; its own key and value are in the cache already. Both have n_heads * head_dim columns.
  void run(std::size_t layer, const Rows& queries, const Rows& out);

 private:
  // Either several rows of one head, or several heads of one row that share keys and values.
  struct Task {
    const Segment* segment = nullptr;
    std::size_t row = 0;  // in the segment
    std::size_t rows = 0;
    std::size_t head = 0;
    std::size_t heads = 0;
  };
  void run_task(const Task& task, std::size_t layer, const Rows& queries, const Rows& out,
                std::vector<float>& scores) const;

  const ModelConfig& config_;
  const simd::Kernels& kernels_;
  ThreadPool& pool_;
  std::vector<Segment> segments_;
  std::vector<Task> tasks_;
  std::size_t work_ = 0;                    // multiplications of one layer, roughly
  std::vector<std::vector<float>> scores_;  // one buffer a worker
};

}  // namespace infemeral
