// What net/ makes of TlsPem: gRPC's credentials, and a sentence for what gRPC says about TLS.
#pragma once

#include <grpcpp/security/credentials.h>
#include <grpcpp/security/server_credentials.h>

#include <memory>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "net/tls.h"

namespace infemeral {

// Without TLS where there is no PEM.
std::shared_ptr<grpc::ChannelCredentials> client_credentials(const std::optional<TlsPem>& tls);
std::shared_ptr<grpc::ServerCredentials> server_credentials(const std::optional<TlsPem>& tls);

// Why a connection that never came up failed, as far as TLS explains it; otherwise OK. `message` is
// gRPC's, `tls` whether this client speaks TLS.
absl::Status explain_tls(const std::string& server, const std::string& message, bool tls);

}  // namespace infemeral
