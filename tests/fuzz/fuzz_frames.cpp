// Everything that an authenticated peer can say: records, frames and packed tensors.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "net/codec.h"
#include "net/frames.h"

namespace {

void check(bool holds) {
  if (!holds) std::abort();
}

// A tensor unpacks to exactly what its rows need, or not at all.
void unpack(const infemeral::PackedTensor& tensor, std::uint32_t rows) {
  for (const std::size_t hidden_size : {1, 64, 576}) {
    const std::size_t expected = rows * infemeral::wire_row_bytes(tensor.dtype, hidden_size);
    if (expected > (1u << 22)) continue;
    std::vector<std::byte> out;
    if (infemeral::unpack_tensor(tensor, expected, out).ok()) check(out.size() == expected);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace infemeral;
  absl::StatusOr<Frame> frame = decode_frame(std::as_bytes(std::span(data, size)));
  if (!frame.ok()) return 0;
  if (const auto* step = std::get_if<StepFrame>(&frame->kind)) unpack(step->tensor, step->rows);
  if (const auto* out = std::get_if<OutputFrame>(&frame->kind)) unpack(out->tensor, out->rows);

  // What was accepted can be said again, and is then the same.
  const std::string once = encode_frame(*frame);
  absl::StatusOr<Frame> again = decode_frame(std::as_bytes(std::span(once.data(), once.size())));
  check(again.ok());
  check(encode_frame(*std::move(again)) == once);
  return 0;
}
