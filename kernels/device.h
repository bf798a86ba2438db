// Owners of what lives on a CUDA device, and its errors as statuses. Everything belongs to an
// object; nothing here is global. For host code: no device syntax.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/stage.h"

namespace infemeral::cuda {

// OK, or what failed while doing `what`: ResourceExhausted when memory is out, Unavailable when
// there is no device or no driver that fits, Internal for the rest. Errors that leave the device
// unusable for this process say so.
absl::Status cuda_status(cudaError_t error, std::string_view what);

// Evaluates a CUDA call and leaves the function with its status, and its name, when it failed.
#define INFEMERAL_CUDA(call)                                                               \
  do {                                                                                     \
    if (const cudaError_t cuda_error = (call); cuda_error != cudaSuccess) {                \
      constexpr std::string_view kCall = #call;                                            \
      return ::infemeral::cuda::cuda_status(cuda_error, kCall.substr(0, kCall.find('('))); \
    }                                                                                      \
  } while (false)

// Leaves the function with a status that is not OK.
#define INFEMERAL_RETURN(expression)                                     \
  do {                                                                   \
    if (absl::Status failed = (expression); !failed.ok()) return failed; \
  } while (false)

// Moves what the absl::StatusOr `expression` holds to `target`, or leaves the function with its
// status.
#define INFEMERAL_ASSIGN(target, expression)        \
  do {                                              \
    auto result_or = (expression);                  \
    if (!result_or.ok()) return result_or.status(); \
    target = *std::move(result_or);                 \
  } while (false)

// What an object has allocated on its device. Shared by its arrays, from any thread.
struct DeviceUsage {
  std::atomic<std::size_t> bytes = 0, peak = 0;
  std::atomic<std::size_t> allocations = 0;  // device and pinned, ever
};

enum class Place {
  kDevice,
  kPinned  // host memory that the device reads and writes directly
};

// `size` values, zeroed. Movable; wiped and freed on destruction.
template <typename T>
class Array {
 public:
  Array() = default;
  static absl::StatusOr<Array> make(Place place, std::size_t size, DeviceUsage& usage);
  Array(Array&& other) noexcept { *this = std::move(other); }
  Array& operator=(Array&& other) noexcept {
    if (this != &other) {
      release();
      data_ = std::exchange(other.data_, nullptr);
      size_ = std::exchange(other.size_, 0);
      place_ = other.place_;
      usage_ = other.usage_;
    }
    return *this;
  }
  ~Array() { release(); }

  T* data() const { return data_; }  // valid on host and device when pinned
  std::size_t size() const { return size_; }
  std::size_t bytes() const { return size_ * sizeof(T); }
  T& operator[](std::size_t i) const { return data_[i]; }  // pinned only

 private:
  void release();
  T* data_ = nullptr;
  std::size_t size_ = 0;
  Place place_ = Place::kDevice;
  DeviceUsage* usage_ = nullptr;
};

absl::StatusOr<void*> allocate(Place place, std::size_t bytes, DeviceUsage& usage);
void deallocate(Place place, void* data, std::size_t bytes, DeviceUsage& usage);

template <typename T>
absl::StatusOr<Array<T>> Array<T>::make(Place place, std::size_t size, DeviceUsage& usage) {
  Array array;
  absl::StatusOr<void*> data = allocate(place, size * sizeof(T), usage);
  if (!data.ok()) return data.status();
  array.data_ = static_cast<T*>(*data);
  array.size_ = size;
  array.place_ = place;
  array.usage_ = &usage;
  return array;
}

// The same into an array that is there already, for owners of several.
template <typename T>
absl::Status allocate(Array<T>& array, Place place, std::size_t size, DeviceUsage& usage) {
  INFEMERAL_ASSIGN(array, Array<T>::make(place, size, usage));
  return absl::OkStatus();
}

template <typename T>
void Array<T>::release() {
  if (data_ != nullptr) deallocate(place_, data_, bytes(), *usage_);
  data_ = nullptr;
}

template <typename T, cudaError_t (*Destroy)(T)>
class Handle {
 public:
  Handle() = default;
  explicit Handle(T handle) : handle_(handle) {}
  Handle(Handle&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Handle& operator=(Handle&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Handle() {
    if (handle_ != nullptr) (void)Destroy(handle_);
  }
  T get() const { return handle_; }
  explicit operator bool() const { return handle_ != nullptr; }

 private:
  T handle_ = nullptr;
};
using Stream = Handle<cudaStream_t, cudaStreamDestroy>;
using Event = Handle<cudaEvent_t, cudaEventDestroy>;
using Graph = Handle<cudaGraphExec_t, cudaGraphExecDestroy>;

// The device that a backend runs on.
struct Device {
  int index = 0;
  std::string name;  // "NVIDIA H100 80GB HBM3"
  Stage stage;       // its stream is `stream`
  Stream stream;
};
// Unavailable, with what to do, when there is none that this build can use.
absl::StatusOr<Device> open_device();

// Records what `enqueue` puts on the stage's stream as one graph.
template <typename Enqueue>
absl::StatusOr<Graph> record(const Stage& stage, const Enqueue& enqueue) {
  INFEMERAL_CUDA(cudaStreamBeginCapture(stage.stream, cudaStreamCaptureModeThreadLocal));
  const absl::Status status = enqueue();
  cudaGraph_t graph = nullptr;
  const cudaError_t ended = cudaStreamEndCapture(stage.stream, &graph);
  if (!status.ok() || ended != cudaSuccess) {
    if (graph != nullptr) (void)cudaGraphDestroy(graph);
    (void)cudaGetLastError();
    return status.ok() ? cuda_status(ended, "cudaStreamEndCapture") : status;
  }
  cudaGraphExec_t executable = nullptr;
  const cudaError_t made = cudaGraphInstantiate(&executable, graph, 0);
  (void)cudaGraphDestroy(graph);
  if (made != cudaSuccess) return cuda_status(made, "cudaGraphInstantiate");
  return Graph(executable);
}

}  // namespace infemeral::cuda
