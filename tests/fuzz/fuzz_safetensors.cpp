// Any bytes as a safetensors file: refused with a status, or every tensor can be read to its end.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <vector>

#include "engine/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace infemeral;
  const auto file = Safetensors::parse(std::as_bytes(std::span(data, size)), "fuzz");
  if (!file.ok()) return 0;
  std::size_t bytes = 0;
  for (const auto& [name, tensor] : file->tensors()) {
    bytes += tensor.data.size();
    std::vector<float> values(tensor.elements());
    tensor.read(0, values);
    if (!file->get(name, tensor.shape).ok()) std::abort();
    std::size_t elements = 1;
    for (const std::size_t n : tensor.shape) elements *= n;
    if (elements != values.size()) std::abort();
  }
  if (bytes > size) std::abort();  // tensors do not overlap
  return 0;
}
