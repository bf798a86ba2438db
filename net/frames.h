// The frames inside the encrypted channel, as plain structs: encoding and strict decoding. Pure
// functions; what depends on a session (hidden size, positions, limits) is checked by its owner.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <variant>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/link.h"
#include "net/codec.h"

namespace infemeral {

// Changes when anything in docs/protocol.md changes that an older end would misread.
inline constexpr std::uint32_t kProtocolVersion = 1;

// No end sends or accepts more, whatever its own limits are.
inline constexpr std::uint32_t kMaxFrameRows = 65536;
inline constexpr std::uint32_t kMaxHiddenSize = 65536;
inline constexpr std::size_t kMaxTextBytes = 512;
// What a frame needs beyond its tensor.
inline constexpr std::size_t kMaxFrameOverhead = 1024;

struct OpenFrame {
  Fingerprint model_fingerprint{};
  Fingerprint cloak_commitment{};
  std::uint32_t hidden_size = 0;
  bool pad = false;  // asks the server to pad its frames
};

struct OpenedFrame {
  SessionInfo session;
  bool padded = false;  // the server does
};

struct StepFrame {
  std::uint64_t session = 0;
  std::uint32_t start_pos = 0;
  std::uint32_t rows = 0;
  Wanted wanted = Wanted::kLast;
  PackedTensor tensor;
};

struct OutputFrame {
  std::uint32_t rows = 0;
  std::uint32_t kv_len = 0;
  double compute_ms = 0;
  PackedTensor tensor;  // empty without rows
};

struct CloseFrame {
  std::uint64_t session = 0;
};

struct ErrorFrame {
  // Never OK. InvalidArgument, NotFound, ResourceExhausted, FailedPrecondition or Internal: another
  // code becomes Internal, both when it is encoded and when it is decoded.
  absl::Status status;
};

struct Frame {
  std::uint64_t request = 0;
  std::variant<OpenFrame, OpenedFrame, StepFrame, OutputFrame, CloseFrame, ErrorFrame> kind;
};

// Takes the frame's tensor with it. Texts are cut to kMaxTextBytes; what is not printable ASCII in
// them becomes '?'. A frame that is at least two bytes shorter than `size` is padded to it.
std::string encode_frame(Frame frame, std::size_t size = 0);

// InvalidArgument for bytes that are no frame; Unimplemented for a frame of another version.
absl::StatusOr<Frame> decode_frame(std::span<const std::byte> bytes);

// The size of every padded frame that carries `rows` rows, or is the answer to a step that asked
// for so many: whatever else is in it, and whether LZ4 made its tensor shorter, it fits. Row counts
// are rounded up to powers of two, but not beyond `max_rows`.
std::size_t padded_frame_bytes(std::uint32_t rows, std::size_t row_bytes, std::uint32_t max_rows);

// The largest frame that a session of these sizes can need.
std::size_t max_frame_bytes(std::uint32_t max_rows, std::size_t hidden_size);

}  // namespace infemeral
