#include "net/client_errors.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "net/frames.h"
#include "net/tls_credentials.h"

namespace infemeral {

std::string printable(std::string text) {
  text.resize(std::min(text.size(), kMaxTextBytes));
  std::replace_if(
      text.begin(), text.end(), [](char c) { return c < ' ' || c > '~'; }, '?');
  return text;
}

absl::Status explain_stream_end(const grpc::Status& status, StreamStage stage,
                                const ClientLinkOptions& options, const PublicKey& client) {
  const std::string& server = options.server;
  const std::string message = printable(status.error_message());
  switch (status.error_code()) {
    case grpc::StatusCode::UNAUTHENTICATED:
      return absl::UnauthenticatedError(absl::StrCat(
          server,
          " does not hold the pinned server key; check --server-key against the public key "
          "that the server prints"));
    case grpc::StatusCode::PERMISSION_DENIED:
      return absl::PermissionDeniedError(absl::StrCat(server, " does not know this client; add ",
                                                      format_public_key(client),
                                                      " to its allow list"));
    case grpc::StatusCode::UNIMPLEMENTED:
      return absl::FailedPreconditionError(absl::StrCat(
          server, " is a gRPC server but not an Infemeral one, or not of this version"));
    case grpc::StatusCode::FAILED_PRECONDITION:
      return absl::FailedPreconditionError(absl::StrCat(server, " refused: ", message));
    case grpc::StatusCode::RESOURCE_EXHAUSTED:
      return absl::UnavailableError(absl::StrCat(server, " refused: ", message));
    case grpc::StatusCode::INVALID_ARGUMENT:
    case grpc::StatusCode::DATA_LOSS:
      return absl::DataLossError(absl::StrCat(server, " could not read this client: ", message));
    case grpc::StatusCode::DEADLINE_EXCEEDED:
      return absl::DeadlineExceededError(absl::StrCat(server, " gave up waiting: ", message));
    default:
      break;
  }
  if (stage == StreamStage::kOpen) {
    return absl::UnavailableError(absl::StrCat("the connection to ", server, " broke: ",
                                               message.empty() ? "the server ended it" : message));
  }
  if (message.find("Connection refused") != std::string::npos) {
    return absl::UnavailableError(absl::StrCat(
        "cannot reach ", server, ": connection refused; is engine_serve running there?"));
  }
  if (absl::Status why = explain_tls(server, message, options.tls.has_value()); !why.ok()) {
    return why;
  }
  return absl::UnavailableError(absl::StrCat("cannot reach ", server, ": ", message));
}

absl::Status not_asked() {
  return absl::DataLossError("the server answered something that was not asked");
}

}  // namespace infemeral
