#include "net/identity.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/json_file.h"

namespace infemeral {
namespace {

constexpr std::string_view kPublicPrefix = "infemeral-public:";
constexpr std::string_view kSecretPrefix = "infemeral-secret:";
constexpr int kBase64 = sodium_base64_VARIANT_URLSAFE_NO_PADDING;
constexpr std::size_t kBase64Size = 43;  // of 32 bytes

// A key file is one line; anything longer is something else.
constexpr std::size_t kMaxKeyFile = 256;

std::string_view trim(std::string_view text) {
  constexpr std::string_view kSpace = " \t\r\n";
  const std::size_t begin = text.find_first_not_of(kSpace);
  if (begin == std::string_view::npos) return {};
  return text.substr(begin, text.find_last_not_of(kSpace) + 1 - begin);
}

// The 32 bytes of a key's base64 text.
bool decode_key(std::string_view text, std::uint8_t* out) {
  std::size_t size = 0;
  return text.size() == kBase64Size &&
         sodium_base642bin(out, 32, text.data(), text.size(), nullptr, &size, nullptr, kBase64) ==
             0 &&
         size == 32;
}

// Closes its descriptor.
class File {
 public:
  explicit File(int descriptor) : descriptor_(descriptor) {}
  ~File() {
    if (descriptor_ >= 0) ::close(descriptor_);
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  int get() const { return descriptor_; }

 private:
  int descriptor_;
};

}  // namespace

Identity::Identity(SecretKey secret) : secret_key_(std::move(secret)) {
  crypto_scalarmult_base(public_key_.data(), secret_key_.data());
}

Identity Identity::generate() {
  SecretKey secret;
  randombytes_buf(secret.data(), SecretKey::size());
  return Identity(std::move(secret));
}

Identity Identity::from_secret(SecretKey secret) {
  return Identity(std::move(secret));
}

absl::StatusOr<Identity> Identity::load(const std::string& path) {
  const File file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (file.get() < 0) {
    const int error = errno;
    return absl::ErrnoToStatus(error, absl::StrCat("cannot open the secret key file ", path));
  }
  struct stat info {};
  if (::fstat(file.get(), &info) != 0 || !S_ISREG(info.st_mode)) {
    return absl::InvalidArgumentError(absl::StrCat(path, " is not a key file"));
  }
  SecretBytes<kMaxKeyFile> buffer;
  std::size_t size = 0;
  while (size < buffer.size()) {
    const ssize_t got = ::read(file.get(), buffer.data() + size, buffer.size() - size);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) {
      const int error = errno;
      return absl::ErrnoToStatus(error, absl::StrCat("cannot read the secret key file ", path));
    }
    if (got == 0) break;
    size += static_cast<std::size_t>(got);
  }
  const std::string_view text =
      trim(std::string_view(reinterpret_cast<const char*>(buffer.data()), size));
  if (text.starts_with(kPublicPrefix)) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, " holds a public key; give the secret key file beside it"));
  }
  if ((info.st_mode & 077) != 0) {
    return absl::PermissionDeniedError(
        absl::StrFormat("the secret key file %s can be read by others (mode %04o); run: chmod 600 "
                        "%s",
                        path, info.st_mode & 07777, path));
  }
  SecretKey secret;
  if (size == buffer.size() || !text.starts_with(kSecretPrefix) ||
      !decode_key(text.substr(kSecretPrefix.size()), secret.data())) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, " is not a secret key file; engine_keygen makes one"));
  }
  return Identity(std::move(secret));
}

absl::Status Identity::save(const std::string& path) const {
  SecretBytes<kSecretPrefix.size() + kBase64Size + 1> line;
  auto* text = reinterpret_cast<char*>(line.data());
  std::memcpy(text, kSecretPrefix.data(), kSecretPrefix.size());
  // Writes its terminating zero where the line feed belongs.
  sodium_bin2base64(text + kSecretPrefix.size(), kBase64Size + 1, secret_key_.data(),
                    SecretKey::size(), kBase64);
  text[line.size() - 1] = '\n';
  absl::Status status = write_new_file(path, {text, line.size()}, 0600);
  if (absl::IsAlreadyExists(status)) {
    return absl::AlreadyExistsError(
        absl::StrCat(path, " exists already; choose another name or move the old key away"));
  }
  return status;
}

std::string format_public_key(const PublicKey& key) {
  std::array<char, kBase64Size + 1> text{};
  sodium_bin2base64(text.data(), text.size(), key.data(), key.size(), kBase64);
  return std::string(kPublicPrefix) + text.data();
}

absl::StatusOr<PublicKey> parse_public_key(std::string_view text) {
  text = trim(text);
  if (text.starts_with(kSecretPrefix)) {
    return absl::InvalidArgumentError(
        "this is a secret key; give the public one, from the file that ends in .pub");
  }
  PublicKey key{};
  if (!text.starts_with(kPublicPrefix) ||
      !decode_key(text.substr(kPublicPrefix.size()), key.data())) {
    return absl::InvalidArgumentError(
        "not a public key; it is one line of the form infemeral-public:<43 characters>");
  }
  return key;
}

absl::StatusOr<std::vector<PublicKey>> load_public_keys(const std::string& path) {
  std::ifstream file(path);
  if (!file) {
    const int error = errno;
    return absl::ErrnoToStatus(error, absl::StrCat("cannot open the list of public keys ", path));
  }
  std::vector<PublicKey> keys;
  std::string line;
  for (int number = 1; std::getline(file, line); ++number) {
    std::string_view text = trim(line);
    if (text.empty() || text.front() == '#') continue;
    text = text.substr(0, text.find_first_of(" \t"));
    absl::StatusOr<PublicKey> key = parse_public_key(text);
    if (!key.ok()) {
      return absl::Status(key.status().code(),
                          absl::StrCat(path, ":", number, ": ", key.status().message()));
    }
    keys.push_back(*key);
  }
  if (file.bad()) return absl::DataLossError(absl::StrCat("cannot read ", path));
  if (keys.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(path, " holds no public key"));
  }
  return keys;
}

absl::StatusOr<std::vector<PublicKey>> read_public_keys(const std::string& text_or_path) {
  const std::string_view text = trim(text_or_path);
  // Never as a path: errors about paths repeat them, and this may be a secret key by mistake.
  if (!text.starts_with(kPublicPrefix) && !text.starts_with(kSecretPrefix)) {
    return load_public_keys(text_or_path);
  }
  absl::StatusOr<PublicKey> key = parse_public_key(text);
  if (!key.ok()) return key.status();
  return std::vector<PublicKey>{*key};
}

bool contains_key(const std::vector<PublicKey>& keys, const PublicKey& key) {
  bool found = false;
  for (const PublicKey& candidate : keys) {
    found |= sodium_memcmp(candidate.data(), key.data(), key.size()) == 0;
  }
  return found;
}

}  // namespace infemeral
