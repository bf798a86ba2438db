// ClientBackend on a CUDA device. Stages and names are those of cpu/client_backend.cpp, its
// readable specification: embed, cloak; decode, uncloak, de_embed, sample.
//
// Everything stays on the device. What crosses the bus for a token is the row that came back with
// its sampling parameters, and the chosen id with the next cloaked row: both in pinned memory that
// the kernels read and write themselves. From the returned row to the token is one graph replay,
// which goes on to embed and cloak that token while the host is still busy with it.
//
// A token does not depend on the rows that it is chosen with, nor a cloaked row on those that it is
// made with: both have the same bits alone and among others.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "engine/backend.h"
#include "engine/certified_head.h"
#include "engine/client_folder.h"
#include "engine/log.h"

namespace infemeral {

enum class CudaMemory {
  kAuto,  // full, and split where the device has not enough memory for it; one line in the log says
          // so
  kFull,  // float16 weights on the device; tied ones once
  kSplit  // int8 rows on the device, float16 rows in pinned host memory, read over the bus one by
          // one
};

struct CudaOptions {
  HeadMode head = HeadMode::kCertified;
  CudaMemory memory = CudaMemory::kAuto;
  float cloak_noise = 0;  // engine/cloak_noise.h; 0: off
};

// Takes over the folder; its weights are copied and need not stay mapped. The current device of the
// calling thread is used, and every call must come with that device current. Errors: Unavailable
// when there is no usable GPU or driver; ResourceExhausted when memory is out; InvalidArgument for
// a model beyond what the kernels take; those of load_token_subset for the subset head.
//
// An error of the device in a later call is Internal and final: every call after it gives the same
// error, and a new backend must be made.
absl::StatusOr<std::unique_ptr<ClientBackend>> make_cuda_client_backend(ClientFolder folder,
                                                                        const CudaOptions& options,
                                                                        const LogSink& log);

}  // namespace infemeral
