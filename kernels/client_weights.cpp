#include "kernels/client_weights.h"

#include <vector>

#include "kernels/upload.h"

namespace infemeral::cuda {
namespace {

absl::Status load_table(const Device& device, const TensorView& view, const ClientShape& shape,
                        Place place, Array<__half>& table, DeviceUsage& usage) {
  INFEMERAL_RETURN(allocate(table, place, shape.vocab() * shape.stride, usage));
  return upload_rows(device, view.data, shape.vocab(), shape.hidden(), shape.stride, place,
                     table.data(), usage);
}

absl::Status make_int8_copy(const Device& device, const ClientShape& shape, ClientWeights& weights,
                            DeviceUsage& usage) {
  const std::size_t rows = int8_rows(shape.vocab());
  INFEMERAL_RETURN(allocate(weights.copy, Place::kDevice, rows * shape.stride, usage));
  INFEMERAL_RETURN(allocate(weights.bounds, Place::kDevice, rows, usage));
  INFEMERAL_RETURN(allocate(weights.largest_norm, Place::kDevice, 1, usage));
  INFEMERAL_CUDA(quantise_rows(device.stage, {.rows = weights.lm_head.data(),
                                              .vocab_size = shape.vocab_size,
                                              .count = shape.vocab_size,
                                              .hidden_size = shape.hidden_size,
                                              .stride = shape.stride,
                                              .copy = weights.copy.data(),
                                              .bounds = weights.bounds.data(),
                                              .largest_norm = weights.largest_norm.data()}));
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<ClientWeights> load_weights(const Device& device, const ClientFolder& folder,
                                           const ClientShape& shape, const WeightsOptions& options,
                                           DeviceUsage& usage) {
  ClientWeights weights;
  INFEMERAL_RETURN(
      load_table(device, folder.lm_head, shape, options.place, weights.lm_head, usage));
  if (folder.lm_head.data.data() != folder.embed_tokens.data.data()) {
    INFEMERAL_RETURN(
        load_table(device, folder.embed_tokens, shape, options.place, weights.embed_tokens, usage));
  }
  if (options.int8_copy) INFEMERAL_RETURN(make_int8_copy(device, shape, weights, usage));

  std::vector<float> gain(shape.hidden());
  folder.final_norm.read(0, gain);
  INFEMERAL_RETURN(allocate(weights.gain, Place::kDevice, shape.stride, usage));
  INFEMERAL_CUDA(cudaMemcpyAsync(weights.gain.data(), gain.data(), gain.size() * sizeof(float),
                                 cudaMemcpyHostToDevice, device.stage.stream));
  INFEMERAL_CUDA(cudaStreamSynchronize(device.stage.stream));
  return weights;
}

}  // namespace infemeral::cuda
