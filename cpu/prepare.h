// Preparation: from a Hugging Face folder to a client folder (what touches text, and the cloak's
// key) and a body folder (a stock checkpoint whose residual stream is rotated).
//
//   OUT/client/   see engine/client_folder.h
//   OUT/body/     config.json, model.safetensors (or shards and an index), infemeral.json
//
// The body's config.json is the model's own with the vocabulary taken out: vocab_size 1, tied, no
// special token ids, and one row of zeros as model.embed_tokens.weight, so that stock loaders find
// every tensor that they expect. Its norms have gain 1, except those on q and k. infemeral.json
// holds format_version, body_dtype, model_fingerprint and cloak_commitment. Nothing in it is
// secret.
//
// An int8 body is for this engine only, and has format version 2: its matrices are I8 with a scale
// for each row beside them (cpu/int8_weights.h), its vectors F32, and its config.json has a
// quantization_config with quant_method "infemeral_int8", at which stock loaders stop.
#pragma once

#include <cstddef>
#include <filesystem>
#include <stop_token>

#include "absl/status/statusor.h"
#include "engine/client_folder.h"
#include "engine/cloak.h"
#include "engine/log.h"
#include "engine/model_config.h"
#include "engine/safetensors.h"

namespace infemeral {

struct PrepareOptions {
  std::filesystem::path model_dir;
  std::filesystem::path output_dir;  // made when it does not exist
  // Float16 suits a rotated model whatever it came in: the rotation spreads
  // large weights over their row, so float16's range is enough, and it keeps 3 bits more than
  // bfloat16. kI8 halves what a server reads for a token and costs accuracy (docs/accuracy.md).
  Dtype body_dtype = Dtype::kF16;
  // kFolded: no work for the cloak in any token, for an lm_head of its own even where embeddings
  // are tied, and one more rounding to float16 of every row.
  CloakMode cloak_mode = CloakMode::kEager;
  const CloakSeed* seed = nullptr;  // null: a fresh random one
  bool overwrite = false;           // replace folders that an earlier preparation wrote
  int threads = 0;                  // 0: physical_cores()
  std::size_t max_shard_bytes = 4'000'000'000;
  LogSink log;
  ProgressSink progress;  // stages "cloak", "client", "body", "check"
  std::stop_token stop;
};

struct PrepareResult {
  ModelConfig config;
  Fingerprint model_fingerprint{};
  bool tied_embeddings = false;  // the model's
  std::size_t client_bytes = 0;  // size of client.safetensors
  std::size_t body_bytes = 0;    // size of the body's tensors
  std::size_t saved_bytes = 0;   // lm_head that did not have to be stored
  // Self-check: the rotated first or last block's output against the plain one's, relative to what
  // the block adds to the stream, and what was allowed.
  double check_error = 0;
  double check_tolerance = 0;
};

// Streams the model tensor by tensor: needs about 7 H^2 doubles and the largest matrix in the
// body's dtype in memory. Writes to a temporary folder inside output_dir and renames at the end;
// whatever goes wrong, nothing half done stays. Errors, besides those of the readers:
//   AlreadyExists     there is a client or a body already (see overwrite)
//   InvalidArgument   a weight that the wanted dtype cannot hold: names the tensor, how many, and
//                     the largest
//   Cancelled         stop was requested
//   Internal          the self-check failed, with its numbers
absl::StatusOr<PrepareResult> prepare_model(const PrepareOptions& options);

}  // namespace infemeral
