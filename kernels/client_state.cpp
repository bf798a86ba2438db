#include "kernels/client_state.h"

#include <utility>
#include <vector>

#include "engine/text.h"
#include "engine/token_subset.h"

namespace infemeral::cuda {

absl::StatusOr<std::unique_ptr<ClientState>> ClientState::load(ClientFolder& folder, HeadMode mode,
                                                               CudaMemory memory) {
  auto state = std::make_unique<ClientState>();
  ClientState& s = *state;
  INFEMERAL_ASSIGN(s.device, open_device());
  INFEMERAL_ASSIGN(s.shape, shape_of(folder.manifest, s.device.stage));
  std::vector<std::int32_t> subset;
  if (mode == HeadMode::kSubset) {
    INFEMERAL_ASSIGN(subset, load_token_subset(folder.manifest, folder.path));
  }
  cublasHandle_t cublas = nullptr;
  INFEMERAL_RETURN(cublas_status(cublasCreate(&cublas), "cublasCreate"));
  s.cublas = Cublas(cublas);
  INFEMERAL_RETURN(
      cublas_status(cublasSetStream(cublas, s.device.stage.stream), "cublasSetStream"));

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
  INFEMERAL_RETURN(s.leave_room_for_cloak());
  s.folder.emplace(std::move(folder));
  return state;
}

// The cloak is made on first use; that the device is too small for it must show when it is loaded,
// when less can still be asked of it.
absl::Status ClientState::leave_room_for_cloak() const {
  std::size_t free = 0, total = 0;
  INFEMERAL_CUDA(cudaMemGetInfo(&free, &total));
  // Kept: three matrices in float16. While it is made: one in float64 with its QR's work, and the
  // float32 product that is checked.
  const std::size_t needed = 24 * shape.hidden() * shape.stride;
  if (free >= needed) return absl::OkStatus();
  return absl::ResourceExhaustedError(
      cat("the GPU has ", free / 1000000, " MB left where the cloak needs ", needed / 1000000));
}

absl::Status ClientState::ensure_cloak() {
  if (cloak) return absl::OkStatus();
  INFEMERAL_ASSIGN(cloak, load_cloak(device, cublas, *folder, usage));
  return absl::OkStatus();
}

void ClientState::drain() const {
  if (!device.stream) return;
  (void)cudaSetDevice(device.index);
  (void)cudaStreamSynchronize(device.stream.get());
}

}  // namespace infemeral::cuda
