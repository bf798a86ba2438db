#include "net/client_errors.h"

#include <algorithm>
#include <string_view>

#include "absl/strings/str_cat.h"
#include "net/frames.h"
#include "net/tls_credentials.h"

namespace infemeral {
namespace {

// Another program, a server that only knows HTTP/1, or a proxy's TLS port, which says so in HTTP/1.
bool speaks_no_http2(std::string_view message) {
  // The last one is a peer that answers in HTTP/1 and leaves the connection open.
  return message.find("http1.x server") != message.npos ||
         message.find("Failed parsing HTTP/2") != message.npos ||
         message.find("missing selected ALPN") != message.npos ||
         message.ends_with("last error: OK");
}

// What gRPC's resolver says of a name without an address.
std::string explain_name(std::string_view message) {
  // "Could not contact DNS servers", "Timeout while contacting DNS servers".
  return message.find("DNS servers") != message.npos
             ? "no name server answers; check this machine's network"
             : "no such host is known; check its name";
}

}  // namespace

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
  if (message.find("DNS resolution failed") != std::string::npos) {
    return absl::UnavailableError(
        absl::StrCat("cannot reach ", server, ": ", explain_name(message)));
  }
  if (speaks_no_http2(message)) {
    return absl::UnavailableError(absl::StrCat(
        "cannot reach ", server, ": it does not answer in HTTP/2; check that the port is ",
        "engine_serve's", options.tls ? "" : ", and if it speaks TLS, give --tls-ca"));
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
