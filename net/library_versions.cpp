#include "net/library_versions.h"

#include <google/protobuf/message.h>
#include <grpcpp/grpcpp.h>
#include <lz4.h>
#include <openssl/crypto.h>
#include <sodium.h>

namespace infemeral {

std::vector<std::pair<std::string, std::string>> library_versions() {
  return {{"grpc", grpc::Version()},
          {"protobuf", google::protobuf::internal::VersionString(GOOGLE_PROTOBUF_VERSION)},
          {"libsodium", sodium_version_string()},
          {"lz4", LZ4_versionString()},
          {"openssl", OpenSSL_version(OPENSSL_VERSION_STRING)}};
}

}  // namespace infemeral
