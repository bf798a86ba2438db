// TLS underneath the Noise channel, for servers behind a proxy, a load balancer or a service mesh
// that asks for it. It adds nothing to what the Noise channel protects: keys are pinned there.
#pragma once

#include <string>

#include "absl/status/statusor.h"

namespace infemeral {

// PEM files of one end; empty where there is none.
struct TlsFiles {
  std::string ca;    // certificates that may have signed the other end's
  std::string cert;  // this end's certificate, and those between it and the CA
  std::string key;   // its private key, without a passphrase

  bool empty() const { return ca.empty() && cert.empty() && key.empty(); }
};

// Their contents, checked by load_tls_*.
struct TlsPem {
  std::string ca;
  std::string cert;
  std::string key;
};

// A server needs `cert` and `key`; with `ca` it admits only clients that show a certificate of it.
// A client needs `ca`; `cert` and `key` are what it shows to a server that asks for it. Errors name
// the file: one that cannot be read, holds no PEM of its kind, or a certificate that has expired;
// InvalidArgument where files are missing or a key belongs to another certificate.
absl::StatusOr<TlsPem> load_server_tls(const TlsFiles& files);
absl::StatusOr<TlsPem> load_client_tls(const TlsFiles& files);

}  // namespace infemeral
