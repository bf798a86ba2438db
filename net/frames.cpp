#include "net/frames.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <string_view>
#include <type_traits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/split_inference.pb.h"

namespace infemeral {
namespace {

bool printable(char c) {
  return c >= ' ' && c <= '~';
}

// Text for the wire.
std::string clean_text(std::string_view text) {
  std::string clean(text.substr(0, kMaxTextBytes));
  std::replace_if(
      clean.begin(), clean.end(), [](char c) { return !printable(c); }, '?');
  return clean;
}

bool text_ok(const std::string& text) {
  return text.size() <= kMaxTextBytes && std::all_of(text.begin(), text.end(), printable);
}

// The codes that docs/protocol.md gives to an Error. The rest say something about an end of the
// stream, or nothing: Cancelled and Unavailable are never the other end's to say of a request.
absl::StatusCode error_code(absl::StatusCode code) {
  switch (code) {
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kNotFound:
    case absl::StatusCode::kResourceExhausted:
    case absl::StatusCode::kFailedPrecondition:
    case absl::StatusCode::kInternal:
      return code;
    default:
      return absl::StatusCode::kInternal;
  }
}

absl::Status bad_frame(const char* what) {
  return absl::InvalidArgumentError(absl::StrCat("a frame with ", what));
}

void set_tensor(PackedTensor tensor, v1::Tensor* message) {
  message->set_dtype(static_cast<v1::Dtype>(tensor.dtype));
  message->set_compression(tensor.lz4 ? v1::COMPRESSION_LZ4 : v1::COMPRESSION_NONE);
  message->set_data(std::move(tensor.bytes));
}

absl::StatusOr<PackedTensor> get_tensor(v1::Tensor* message) {
  const std::optional<WireDtype> dtype =
      wire_dtype_from_number(static_cast<std::uint32_t>(message->dtype()));
  if (!dtype) return bad_frame("an unknown dtype");
  if (message->compression() != v1::COMPRESSION_NONE &&
      message->compression() != v1::COMPRESSION_LZ4) {
    return bad_frame("an unknown compression");
  }
  return PackedTensor{.dtype = *dtype,
                      .lz4 = message->compression() == v1::COMPRESSION_LZ4,
                      .bytes = std::move(*message->mutable_data())};
}

bool get_fingerprint(const std::string& bytes, Fingerprint& out) {
  if (bytes.size() != out.size()) return false;
  std::memcpy(out.data(), bytes.data(), out.size());
  return true;
}

void set_kind(const OpenFrame& open, v1::Frame& message) {
  v1::Open* out = message.mutable_open();
  out->set_model_fingerprint(open.model_fingerprint.data(), open.model_fingerprint.size());
  out->set_cloak_commitment(open.cloak_commitment.data(), open.cloak_commitment.size());
  out->set_hidden_size(open.hidden_size);
  out->set_pad(open.pad);
}

void set_kind(const OpenedFrame& opened, v1::Frame& message) {
  v1::Opened* out = message.mutable_opened();
  out->set_session(opened.session.id);
  out->set_hidden_size(opened.session.hidden_size);
  out->set_max_context(opened.session.max_context);
  out->set_max_rows(opened.session.max_rows);
  out->set_body(clean_text(opened.session.body));
  out->set_padded(opened.padded);
}

void set_kind(StepFrame step, v1::Frame& message) {
  v1::Step* out = message.mutable_step();
  out->set_session(step.session);
  out->set_start_pos(step.start_pos);
  out->set_rows(step.rows);
  out->set_wanted(static_cast<v1::Wanted>(step.wanted));
  set_tensor(std::move(step.tensor), out->mutable_tensor());
}

void set_kind(OutputFrame output, v1::Frame& message) {
  v1::Output* out = message.mutable_output();
  out->set_rows(output.rows);
  out->set_kv_len(output.kv_len);
  out->set_compute_ms(output.compute_ms);
  if (output.rows > 0) set_tensor(std::move(output.tensor), out->mutable_tensor());
}

void set_kind(const CloseFrame& close, v1::Frame& message) {
  message.mutable_close()->set_session(close.session);
}

void set_kind(const ErrorFrame& error, v1::Frame& message) {
  v1::Error* out = message.mutable_error();
  out->set_code(static_cast<std::uint32_t>(error_code(error.status.code())));
  const auto text = error.status.message();
  out->set_message(clean_text(std::string_view(text.data(), text.size())));
}

absl::StatusOr<OpenFrame> get_open(const v1::Open& message) {
  OpenFrame open{.hidden_size = message.hidden_size(), .pad = message.pad()};
  if (!get_fingerprint(message.model_fingerprint(), open.model_fingerprint) ||
      !get_fingerprint(message.cloak_commitment(), open.cloak_commitment)) {
    return bad_frame("a fingerprint that is not 32 bytes long");
  }
  if (open.hidden_size < 1 || open.hidden_size > kMaxHiddenSize) {
    return bad_frame("an impossible hidden size");
  }
  return open;
}

absl::StatusOr<OpenedFrame> get_opened(v1::Opened* message) {
  if (message->session() == 0) return bad_frame("no session");
  if (message->hidden_size() < 1 || message->hidden_size() > kMaxHiddenSize ||
      message->max_rows() < 1 || message->max_rows() > kMaxFrameRows ||
      message->max_context() < 1) {
    return bad_frame("impossible limits");
  }
  if (!text_ok(message->body())) return bad_frame("an unreadable description");
  return OpenedFrame{{.id = message->session(),
                      .hidden_size = message->hidden_size(),
                      .max_context = message->max_context(),
                      .max_rows = message->max_rows(),
                      .body = std::move(*message->mutable_body())},
                     message->padded()};
}

absl::StatusOr<StepFrame> get_step(v1::Step* message) {
  if (message->session() == 0) return bad_frame("no session");
  if (message->rows() < 1 || message->rows() > kMaxFrameRows) {
    return bad_frame("an impossible number of rows");
  }
  if (message->start_pos() > std::numeric_limits<std::uint32_t>::max() - message->rows()) {
    return bad_frame("an impossible position");
  }
  if (!v1::Wanted_IsValid(message->wanted())) return bad_frame("an unknown wish for rows");
  if (!message->has_tensor()) return bad_frame("no tensor");
  absl::StatusOr<PackedTensor> tensor = get_tensor(message->mutable_tensor());
  if (!tensor.ok()) return tensor.status();
  return StepFrame{.session = message->session(),
                   .start_pos = message->start_pos(),
                   .rows = message->rows(),
                   .wanted = static_cast<Wanted>(message->wanted()),
                   .tensor = *std::move(tensor)};
}

absl::StatusOr<OutputFrame> get_output(v1::Output* message) {
  if (message->rows() > kMaxFrameRows) return bad_frame("an impossible number of rows");
  if (!std::isfinite(message->compute_ms()) || message->compute_ms() < 0) {
    return bad_frame("an impossible compute time");
  }
  if (message->has_tensor() != (message->rows() > 0)) return bad_frame("rows and tensor at odds");
  OutputFrame output{
      .rows = message->rows(), .kv_len = message->kv_len(), .compute_ms = message->compute_ms()};
  if (output.rows > 0) {
    absl::StatusOr<PackedTensor> tensor = get_tensor(message->mutable_tensor());
    if (!tensor.ok()) return tensor.status();
    output.tensor = *std::move(tensor);
  }
  return output;
}

absl::StatusOr<CloseFrame> get_close(const v1::Close& message) {
  if (message.session() == 0) return bad_frame("no session");
  return CloseFrame{message.session()};
}

absl::StatusOr<ErrorFrame> get_error(const v1::Error& message) {
  // The canonical codes; 0 would be no error.
  if (message.code() < 1 || message.code() > 16) return bad_frame("an unknown error code");
  if (!text_ok(message.message())) return bad_frame("an unreadable error");
  const auto code = error_code(static_cast<absl::StatusCode>(message.code()));
  return ErrorFrame{absl::Status(code, message.message())};
}

// Puts the decoded kind into a Frame.
template <typename Kind>
absl::StatusOr<Frame> framed(std::uint64_t request, absl::StatusOr<Kind> kind) {
  if (!kind.ok()) return kind.status();
  return Frame{request, *std::move(kind)};
}

// A padding field without contents: its tag and its length.
constexpr std::size_t kEmptyPadding = 2;

std::size_t padding_field_bytes(std::size_t contents) {
  const std::size_t length_bytes = 1 + (std::bit_width(contents | 1) - 1) / 7;  // a varint
  return 1 + length_bytes + contents;
}

// Makes the message longer by exactly `bytes`, at least kEmptyPadding.
void add_padding(std::size_t bytes, v1::Frame& message) {
  std::size_t contents = bytes - kEmptyPadding;
  while (padding_field_bytes(contents) > bytes) --contents;
  // Where the length takes one byte more, a size is left out: two fields make it.
  if (padding_field_bytes(contents) < bytes) {
    message.add_padding();
    add_padding(bytes - kEmptyPadding, message);
    return;
  }
  message.add_padding()->assign(contents, '\0');
}

}  // namespace

std::string encode_frame(Frame frame, std::size_t size) {
  v1::Frame message;
  message.set_version(kProtocolVersion);
  message.set_request(frame.request);
  std::visit([&](auto& kind) { set_kind(std::move(kind), message); }, frame.kind);
  if (size > 0) {
    const std::size_t bare = message.ByteSizeLong();
    if (bare + kEmptyPadding <= size) add_padding(size - bare, message);
  }
  return message.SerializeAsString();
}

absl::StatusOr<Frame> decode_frame(std::span<const std::byte> bytes) {
  v1::Frame message;
  if (bytes.size() > static_cast<std::size_t>(std::numeric_limits<int>::max()) ||
      !message.ParseFromArray(bytes.data(), static_cast<int>(bytes.size()))) {
    return absl::InvalidArgumentError("bytes that are no frame");
  }
  if (message.version() != kProtocolVersion) {
    return absl::UnimplementedError(absl::StrCat("a frame of protocol version ", message.version(),
                                                 "; this end speaks ", kProtocolVersion));
  }
  const std::uint64_t request = message.request();
  switch (message.kind_case()) {
    case v1::Frame::kOpen:
      return framed(request, get_open(message.open()));
    case v1::Frame::kOpened:
      return framed(request, get_opened(message.mutable_opened()));
    case v1::Frame::kStep:
      return framed(request, get_step(message.mutable_step()));
    case v1::Frame::kOutput:
      return framed(request, get_output(message.mutable_output()));
    case v1::Frame::kClose:
      return framed(request, get_close(message.close()));
    case v1::Frame::kError:
      return framed(request, get_error(message.error()));
    case v1::Frame::KIND_NOT_SET:
      break;
  }
  return bad_frame("unknown contents");
}

std::size_t padded_frame_bytes(std::uint32_t rows, std::size_t row_bytes, std::uint32_t max_rows) {
  // What a Step or an Output needs beyond its tensor is less than 60 bytes.
  constexpr std::size_t kBesideTensor = 128;
  const std::size_t bucket = rows == 0 ? 0 : std::min(std::bit_ceil(rows), max_rows);
  return std::max(kMaxFrameOverhead, kBesideTensor + bucket * row_bytes);
}

std::size_t max_frame_bytes(std::uint32_t max_rows, std::size_t hidden_size) {
  return max_rows * wire_row_bytes(WireDtype::kF32, hidden_size) + kMaxFrameOverhead;
}

}  // namespace infemeral
