// Rotary position embeddings (Su et al., arXiv:2104.09864) in Hugging Face's convention: element i
// of a head turns together with element i + head_dim/2.
#pragma once

#include <cstddef>
#include <vector>

#include "engine/model_config.h"

namespace infemeral {

class RopeTable {
 public:
  // Frequencies theta^(-2i/head_dim), stretched as Llama 3 does it if the configuration says so.
  explicit RopeTable(const ModelConfig& config);

  // Computes the angles of positions [0, count), in float64, unless they are there already. The
  // table grows with use: for a context of 128k positions all of it would be 64 MiB.
  void extend(std::size_t count);

  // Turns `heads` heads of head_dim floats in place; position < the largest count of extend().
  void rotate(float* x, std::size_t heads, std::size_t position) const;

  // Angle per position, for head_dim/2 pairs.
  const std::vector<double>& frequencies() const { return frequencies_; }

 private:
  std::vector<double> frequencies_;
  std::vector<float> cosines_;  // position x head_dim/2
  std::vector<float> sines_;
};

}  // namespace infemeral
