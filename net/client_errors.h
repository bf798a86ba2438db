// What the client's end says of a stream that broke or never came up: gRPC's status as a sentence
// that a user can act on. No state, any thread.
#pragma once

#include <grpcpp/support/status.h>

#include <string>

#include "absl/status/status.h"
#include "net/client_link.h"
#include "net/identity.h"

namespace infemeral {

enum class StreamStage { kConnecting, kOpen };

// What gRPC or an unauthenticated server says, fit for a terminal: printable and not too long.
std::string printable(std::string text);

// Why a stream to options.server ended with `status`; `client` is this client's key. Never
// InvalidArgument, Unimplemented or ResourceExhausted, which a caller takes for the fault of one
// request, after which it may send the next.
absl::Status explain_stream_end(const grpc::Status& status, StreamStage stage,
                                const ClientLinkOptions& options, const PublicKey& client);

// DataLoss, for an answer that belongs to no question.
absl::Status not_asked();

}  // namespace infemeral
