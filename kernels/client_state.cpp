#include "kernels/client_state.h"

#include <future>
#include <utility>
#include <vector>

#include "engine/token_subset.h"

namespace infemeral::cuda {

absl::StatusOr<std::unique_ptr<ClientState>> ClientState::load(const ClientFolder& folder,
                                                               HeadMode mode, CudaMemory memory) {
  auto state = std::make_unique<ClientState>();
  ClientState& s = *state;
  INFEMERAL_ASSIGN(s.device, open_device());
  INFEMERAL_ASSIGN(s.shape, shape_of(folder.manifest, s.device.stage));
  std::vector<std::int32_t> subset;
  if (mode == HeadMode::kSubset) {
    INFEMERAL_ASSIGN(subset, load_token_subset(folder.manifest, folder.path));
  }
  // Beside the weights, which wait for the bus while this one is busy with the libraries.
  std::future<absl::Status> cloak =
      std::async(std::launch::async, [&] { return s.load_cloak_beside(folder); });

  const WeightsOptions options = {
      .place = memory == CudaMemory::kSplit ? Place::kPinned : Place::kDevice,
      .int8_copy = mode == HeadMode::kCertified || mode == HeadMode::kInt8};
  INFEMERAL_ASSIGN(s.weights, load_weights(s.device, folder, s.shape, options, s.usage));
  if (mode == HeadMode::kSubset) {
    auto head = SubsetHead::load(s.device, folder, s.shape, std::move(subset), s.usage);
    if (!head.ok()) return head.status();
    s.subset.emplace(*std::move(head));
  }
  INFEMERAL_ASSIGN(s.buffers, make_call_buffers(s.shape, mode == HeadMode::kCertified, s.usage));
  INFEMERAL_ASSIGN(s.mailbox, Mailbox::make(s.shape, s.device.stage.stream, s.usage));
  INFEMERAL_RETURN(cloak.get());
  return state;
}

// By a thread of its own, on a stream of its own until all is there.
absl::Status ClientState::load_cloak_beside(const ClientFolder& client) {
  INFEMERAL_CUDA(cudaSetDevice(device.index));
  cudaStream_t stream = nullptr;
  INFEMERAL_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  const Stream own(stream);
  Stage stage = device.stage;
  stage.stream = stream;
  INFEMERAL_ASSIGN(cloak, load_cloak(stage, client, usage));
  return absl::OkStatus();
}

void ClientState::drain() const {
  if (!device.stream) return;
  (void)cudaSetDevice(device.index);
  (void)cudaStreamSynchronize(device.stream.get());
}

}  // namespace infemeral::cuda
