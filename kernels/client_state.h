// Everything that a client keeps on its device.
#pragma once

#include <memory>
#include <optional>

#include "absl/status/statusor.h"
#include "engine/certified_head.h"
#include "engine/client_folder.h"
#include "kernels/call_buffers.h"
#include "kernels/client_backend.h"
#include "kernels/client_shape.h"
#include "kernels/client_weights.h"
#include "kernels/cloak.h"
#include "kernels/device.h"
#include "kernels/mailbox.h"
#include "kernels/subset_head.h"

namespace infemeral::cuda {

// Complete once loaded, and at the same addresses until it is destroyed: graphs are recorded with
// them. The members are in the order in which they need each other.
struct ClientState {
  DeviceUsage usage;
  Device device;
  ClientShape shape;
  ClientWeights weights;
  std::optional<SubsetHead> subset;  // of the subset head
  CallBuffers buffers;
  Mailbox mailbox;
  DeviceCloak cloak;

  // Errors: make_cuda_client_backend's.
  static absl::StatusOr<std::unique_ptr<ClientState>> load(const ClientFolder& folder,
                                                           HeadMode mode, CudaMemory memory);
  ClientState() = default;
  ClientState(const ClientState&) = delete;
  ClientState& operator=(const ClientState&) = delete;
  ~ClientState() { drain(); }

  // Waits until the stream is empty, with this device as the current one.
  void drain() const;

 private:
  absl::Status load_cloak_beside(const ClientFolder& folder);
};

}  // namespace infemeral::cuda
