// Client backend, encrypted link, server and body in one process: what the whole-system tests run.
#pragma once

#include <filesystem>
#include <memory>

#include "engine/backend.h"
#include "engine/link.h"
#include "tools/endpoint.h"

namespace infemeral {

// Opens OUT of engine_prep; fails the running test when something does not open.
struct PrivateStack {
  explicit PrivateStack(const std::filesystem::path& prepared, int threads = 0);

  ClientManifest manifest;
  std::unique_ptr<ClientBackend> backend;
  std::optional<Endpoint> endpoint;
  std::unique_ptr<Link> link;
};

}  // namespace infemeral
