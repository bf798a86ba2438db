#include "net/tls.h"

#include <openssl/bio.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/x509.h>

#include <memory>

#include "absl/strings/str_cat.h"
#include "engine/json_file.h"
#include "net/tls_credentials.h"

namespace infemeral {
namespace {

constexpr std::size_t kMaxPemBytes = std::size_t{8} << 20;  // a bundle of all public CAs is 0.2 MB

struct Free {
  void operator()(BIO* bio) const { BIO_free(bio); }
  void operator()(X509* certificate) const { X509_free(certificate); }
  void operator()(EVP_PKEY* key) const { EVP_PKEY_free(key); }
};
template <typename T>
using Owned = std::unique_ptr<T, Free>;

Owned<BIO> reader(const std::string& pem) {
  return Owned<BIO>(BIO_new_mem_buf(pem.data(), static_cast<int>(pem.size())));
}

// Never asks a terminal for a passphrase.
int no_passphrase(char*, int, int, void*) {
  return -1;
}

Owned<X509> first_certificate(const std::string& pem) {
  Owned<X509> certificate(PEM_read_bio_X509(reader(pem).get(), nullptr, no_passphrase, nullptr));
  ERR_clear_error();
  return certificate;
}

absl::StatusOr<std::string> read_certificates(const std::string& file) {
  absl::StatusOr<std::string> pem = read_text_file(file, kMaxPemBytes);
  if (pem.ok() && !first_certificate(*pem)) {
    return absl::InvalidArgumentError(absl::StrCat(file, " holds no certificate in PEM"));
  }
  return pem;
}

// The certificate that an end shows, and its key.
absl::Status read_own(const TlsFiles& files, TlsPem& out) {
  absl::StatusOr<std::string> cert = read_certificates(files.cert);
  if (!cert.ok()) return cert.status();
  absl::StatusOr<std::string> key = read_text_file(files.key, kMaxPemBytes);
  if (!key.ok()) return key.status();
  const Owned<X509> certificate = first_certificate(*cert);
  if (X509_cmp_current_time(X509_get0_notAfter(certificate.get())) <= 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("the certificate in ", files.cert, " has expired; renew it"));
  }
  const Owned<EVP_PKEY> private_key(
      PEM_read_bio_PrivateKey(reader(*key).get(), nullptr, no_passphrase, nullptr));
  ERR_clear_error();
  if (!private_key) {
    return absl::InvalidArgumentError(
        absl::StrCat(files.key,
                     " holds no private key in PEM that can be read without a "
                     "passphrase"));
  }
  const bool fits = X509_check_private_key(certificate.get(), private_key.get()) == 1;
  ERR_clear_error();
  if (!fits) {
    return absl::InvalidArgumentError(
        absl::StrCat(files.key, " is not the key of the certificate in ", files.cert));
  }
  out.cert = *std::move(cert);
  out.key = *std::move(key);
  return absl::OkStatus();
}

absl::Status read_ca(const TlsFiles& files, TlsPem& out) {
  absl::StatusOr<std::string> ca = read_certificates(files.ca);
  if (!ca.ok()) return ca.status();
  out.ca = *std::move(ca);
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<TlsPem> load_server_tls(const TlsFiles& files) {
  if (files.cert.empty() || files.key.empty()) {
    return absl::InvalidArgumentError("TLS needs both --tls-cert and --tls-key");
  }
  TlsPem pem;
  if (absl::Status status = read_own(files, pem); !status.ok()) return status;
  if (files.ca.empty()) return pem;
  if (absl::Status status = read_ca(files, pem); !status.ok()) return status;
  return pem;
}

absl::StatusOr<TlsPem> load_client_tls(const TlsFiles& files) {
  if (files.ca.empty()) {
    return absl::InvalidArgumentError(
        "TLS needs --tls-ca: the certificate of the CA that signed the server's");
  }
  if (files.cert.empty() != files.key.empty()) {
    return absl::InvalidArgumentError(
        "a TLS client certificate needs both --tls-cert and --tls-key");
  }
  TlsPem pem;
  if (absl::Status status = read_ca(files, pem); !status.ok()) return status;
  if (files.cert.empty()) return pem;
  if (absl::Status status = read_own(files, pem); !status.ok()) return status;
  return pem;
}

std::shared_ptr<grpc::ChannelCredentials> client_credentials(const std::optional<TlsPem>& tls) {
  if (!tls) return grpc::InsecureChannelCredentials();
  return grpc::SslCredentials(
      {.pem_root_certs = tls->ca, .pem_private_key = tls->key, .pem_cert_chain = tls->cert});
}

std::shared_ptr<grpc::ServerCredentials> server_credentials(const std::optional<TlsPem>& tls) {
  if (!tls) return grpc::InsecureServerCredentials();
  grpc::SslServerCredentialsOptions options(
      tls->ca.empty() ? GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE
                      : GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY);
  options.pem_root_certs = tls->ca;
  options.pem_key_cert_pairs.push_back({tls->key, tls->cert});
  return grpc::SslServerCredentials(options);
}

absl::Status explain_tls(const std::string& server, const std::string& message, bool tls) {
  const auto says = [&](const char* words) { return message.find(words) != std::string::npos; };
  if (tls && says("certificate verify failed")) {
    return absl::UnauthenticatedError(absl::StrCat(
        server,
        " shows a certificate that none of the CAs of --tls-ca signed, or that has expired"));
  }
  if (tls && says("is not in peer certificate")) {
    return absl::UnauthenticatedError(absl::StrCat(
        server, " shows a certificate for another name; connect to a name that it was made for"));
  }
  if (tls && says("wrong version number")) {
    return absl::UnavailableError(
        absl::StrCat("cannot reach ", server, ": it has no TLS on this port; leave --tls-ca out"));
  }
  // A proxy's words to a connection without a certificate.
  if (tls && says("http2 header with status: 400")) {
    return absl::UnavailableError(absl::StrCat(
        "cannot reach ", server,
        ": a proxy refuses (HTTP status 400); if it asks for client certificates, give --tls-cert "
        "and --tls-key"));
  }
  // Ends without a word are all that is seen of a server that expects TLS, or a certificate.
  if (!says("Socket closed") && !says("Connection reset") && !says("Broken pipe") &&
      !says(" alert ")) {
    return absl::OkStatus();
  }
  return absl::UnavailableError(
      absl::StrCat("cannot reach ", server, ": it ended the connection at once; if it ",
                   tls ? "asks for client certificates, give --tls-cert and --tls-key of a CA that "
                         "it knows"
                       : "speaks TLS, give --tls-ca"));
}

}  // namespace infemeral
