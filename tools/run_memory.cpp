#include "tools/run_memory.h"

namespace infemeral {

RunMemory table_memory(const ClientFolder& folder) {
  return {.embed_tokens_bytes = folder.embed_tokens.data.size(),
          .lm_head_bytes = folder.manifest.tied_embeddings ? 0 : folder.lm_head.data.size()};
}

void put_body_memory(const Endpoint& endpoint, const std::filesystem::path& body_folder,
                     RunMemory& memory) {
  if (endpoint.local_body() == nullptr) return;
  memory.kv_bytes_per_token = endpoint.local_body()->info().kv_bytes_per_token;
  std::error_code error;
  std::filesystem::directory_iterator entry(body_folder, error);
  for (; !error && entry != std::filesystem::directory_iterator(); entry.increment(error)) {
    std::error_code no_size;
    const auto bytes = entry->path().extension() == ".safetensors" ? entry->file_size(no_size) : 0;
    if (!no_size) memory.body_weights_bytes += bytes;
  }
}

}  // namespace infemeral
