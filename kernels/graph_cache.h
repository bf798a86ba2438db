// Graphs of what a stage is asked to do again and again.
#pragma once

#include <map>

#include "kernels/device.h"

namespace infemeral::cuda {

// A graph is recorded with the addresses and the arguments of its first launch: everything that may
// change between launches of one key is read from memory, by the kernels themselves.
template <typename Key>
class GraphCache {
 public:
  // Launches the graph of `key`; `enqueue` puts its kernels on the stage's stream and is asked only
  // the first time.
  template <typename Enqueue>
  absl::Status launch(const Stage& stage, const Key& key, const Enqueue& enqueue) {
    Graph& graph = graphs_[key];
    if (!graph) {
      absl::StatusOr<Graph> recorded = record(stage, enqueue);
      if (!recorded.ok()) return recorded.status();
      graph = *std::move(recorded);
    }
    INFEMERAL_CUDA(cudaGraphLaunch(graph.get(), stage.stream));
    return absl::OkStatus();
  }

 private:
  std::map<Key, Graph> graphs_;
};

}  // namespace infemeral::cuda
