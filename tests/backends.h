// The client backends that were built: a type each, for suites that run over all of them.
#pragma once

#include <catch2/catch.hpp>
#include <cstddef>
#include <iostream>
#include <memory>
#include <utility>

#include "cpu/client_backend.h"
#include "tests/client_fixture.h"
#ifdef INFEMERAL_HAVE_CUDA
#include "kernels/client_backend.h"
#define INFEMERAL_BACKENDS Cpu, Cuda
#else
#define INFEMERAL_BACKENDS Cpu
#endif

namespace infemeral {

using MadeBackend = absl::StatusOr<std::unique_ptr<ClientBackend>>;

struct Cpu {
  static constexpr bool kNeedsDevice = false;
  static constexpr double kUnit = 0x1p-24;    // of float32 sums; see client_fixture.h
  static constexpr bool kHostLibrary = true;  // its logarithms are the host's, to the last bit
  static MadeBackend make(ClientFolder folder, HeadMode head) {
    return make_cpu_client_backend(std::move(folder), {.head = head});
  }
};

#ifdef INFEMERAL_HAVE_CUDA
struct Cuda {
  static constexpr bool kNeedsDevice = true;
  static constexpr double kUnit = 0x1p-23;  // tensor cores truncate
  static constexpr bool kHostLibrary = false;
  static MadeBackend make(ClientFolder folder, HeadMode head) {
    return make_cuda_client_backend(std::move(folder), {.head = head}, {});
  }
};
#endif

// False, and one line on the first call, on a machine without the device.
template <typename Backend>
bool available() {
  static const absl::Status status = Backend::make(Client({}).open(), HeadMode::kFull).status();
  if (!Backend::kNeedsDevice || status.code() != absl::StatusCode::kUnavailable) return true;
  [[maybe_unused]] static const bool said = [] {
    std::cout << "skipped: no GPU (" << status.message() << ")\n";
    return true;
  }();
  return false;
}

template <typename Backend>
std::unique_ptr<ClientBackend> load(const Client& client, HeadMode head = HeadMode::kCertified) {
  MadeBackend backend = Backend::make(client.open(), head);
  INFO(backend.status().message());
  REQUIRE(backend.ok());
  return *std::move(backend);
}

}  // namespace infemeral
