// Bytes that a run holds, gathered for its report.
#pragma once

#include <filesystem>

#include "engine/client_folder.h"
#include "engine/report.h"
#include "tools/endpoint.h"

namespace infemeral {

// The client's tables, as stored.
RunMemory table_memory(const ClientFolder& folder);
// Adds a local body's weights and what a position of its KV cache takes; a remote body's are not
// known here.
void put_body_memory(const Endpoint& endpoint, const std::filesystem::path& body_folder,
                     RunMemory& memory);

}  // namespace infemeral
