#include "kernels/upload.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

namespace infemeral::cuda {
namespace {

constexpr std::size_t kPieceBytes = 8 << 20;
constexpr unsigned kMaxThreads = 8;

// One thread's way to the device: two buffers, one of which is filled while the other is copied.
struct Lane {
  Array<std::byte> buffers[2];
  Event copied[2];
  Stream stream;
};

absl::StatusOr<Lane> make_lane(DeviceUsage& usage) {
  Lane lane;
  cudaStream_t stream = nullptr;
  INFEMERAL_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  lane.stream = Stream(stream);
  for (int i = 0; i < 2; ++i) {
    auto buffer = Array<std::byte>::make(Place::kPinned, kPieceBytes, usage);
    if (!buffer.ok()) return buffer.status();
    lane.buffers[i] = *std::move(buffer);
    cudaEvent_t event = nullptr;
    INFEMERAL_CUDA(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    lane.copied[i] = Event(event);
  }
  return lane;
}

}  // namespace

absl::Status upload_rows(const Device& device, std::span<const std::byte> source, std::size_t rows,
                         std::size_t cols, std::size_t stride, Place place, __half* target,
                         DeviceUsage& usage) {
  const std::size_t row_bytes = cols * sizeof(__half), pitch = stride * sizeof(__half);
  const std::size_t piece_rows = std::max<std::size_t>(1, kPieceBytes / row_bytes);
  if (row_bytes > kPieceBytes) return absl::InvalidArgumentError("a row of weights is too long");
  const std::size_t pieces = (rows + piece_rows - 1) / piece_rows;
  const std::size_t threads = std::min<std::size_t>(
      pieces, std::clamp(std::thread::hardware_concurrency(), 1u, kMaxThreads));

  std::vector<Lane> lanes;
  for (std::size_t t = 0; t < threads && place == Place::kDevice; ++t) {
    auto lane = make_lane(usage);
    if (!lane.ok()) return lane.status();
    lanes.push_back(*std::move(lane));
  }
  std::atomic<std::size_t> next = 0;
  const auto work = [&](std::size_t t) -> absl::Status {
    INFEMERAL_CUDA(cudaSetDevice(device.index));
    for (std::size_t turn = 0;; ++turn) {
      const std::size_t piece = next.fetch_add(1);
      if (piece >= pieces) break;
      const std::size_t first = piece * piece_rows, count = std::min(piece_rows, rows - first);
      const std::byte* from = source.data() + first * row_bytes;
      __half* to = target + first * stride;
      if (place == Place::kPinned) {
        for (std::size_t r = 0; r < count; ++r) {
          std::memcpy(to + r * stride, from + r * row_bytes, row_bytes);
        }
        continue;
      }
      Lane& lane = lanes[t];
      const int side = static_cast<int>(turn % 2);
      INFEMERAL_CUDA(cudaEventSynchronize(lane.copied[side].get()));
      std::memcpy(lane.buffers[side].data(), from, count * row_bytes);
      INFEMERAL_CUDA(cudaMemcpy2DAsync(to, pitch, lane.buffers[side].data(), row_bytes, row_bytes,
                                       count, cudaMemcpyHostToDevice, lane.stream.get()));
      INFEMERAL_CUDA(cudaEventRecord(lane.copied[side].get(), lane.stream.get()));
    }
    if (place == Place::kDevice) INFEMERAL_CUDA(cudaStreamSynchronize(lanes[t].stream.get()));
    return absl::OkStatus();
  };
  std::vector<absl::Status> results(threads);
  std::vector<std::thread> others;
  for (std::size_t t = 1; t < threads; ++t) {
    others.emplace_back([&, t] { results[t] = work(t); });
  }
  results[0] = work(0);
  for (std::thread& other : others) other.join();
  for (const absl::Status& result : results) {
    if (!result.ok()) return result;
  }
  return absl::OkStatus();
}

}  // namespace infemeral::cuda
