#include "net/identity.h"

#include <sys/stat.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>

namespace infemeral {
namespace {

// A fresh folder, removed at the end.
struct Folder {
  std::filesystem::path path;
  Folder() {
    std::string name = (std::filesystem::temp_directory_path() / "identity_test.XXXXXX").string();
    REQUIRE(mkdtemp(name.data()) != nullptr);
    path = name;
  }
  ~Folder() { std::filesystem::remove_all(path); }
  std::string file(const std::string& name) const { return (path / name).string(); }
  std::string write(const std::string& name, const std::string& text, mode_t mode = 0600) const {
    std::ofstream(file(name), std::ios::binary) << text;
    REQUIRE(chmod(file(name).c_str(), mode) == 0);
    return file(name);
  }
};

std::string read(const std::string& path) {
  std::ostringstream text;
  text << std::ifstream(path, std::ios::binary).rdbuf();
  return text.str();
}

}  // namespace

TEST_CASE("a saved identity loads again and its file is private") {
  Folder folder;
  const std::string path = folder.file("key");
  const Identity identity = Identity::generate();
  REQUIRE(identity.save(path).ok());
  struct stat info {};
  REQUIRE(stat(path.c_str(), &info) == 0);
  CHECK((info.st_mode & 07777) == 0600);
  CHECK(info.st_size == 17 + 43 + 1);

  const auto loaded = Identity::load(path);
  REQUIRE(loaded.ok());
  CHECK(loaded->public_key() == identity.public_key());
  CHECK(std::memcmp(loaded->secret_key().data(), identity.secret_key().data(), 32) == 0);
  CHECK(Identity::generate().public_key() != identity.public_key());

  // A key is never overwritten.
  const std::string before = read(path);
  CHECK(Identity::generate().save(path).code() == absl::StatusCode::kAlreadyExists);
  CHECK(read(path) == before);
}

TEST_CASE("the public key is RFC 7748's") {
  // Section 6.1, Alice's pair.
  const unsigned char secret[32] = {0x77, 0x07, 0x6d, 0x0a, 0x73, 0x18, 0xa5, 0x7d,
                                    0x3c, 0x16, 0xc1, 0x72, 0x51, 0xb2, 0x66, 0x45,
                                    0xdf, 0x4c, 0x2f, 0x87, 0xeb, 0xc0, 0x99, 0x2a,
                                    0xb1, 0x77, 0xfb, 0xa5, 0x1d, 0xb9, 0x2c, 0x2a};
  const PublicKey expected = {0x85, 0x20, 0xf0, 0x09, 0x89, 0x30, 0xa7, 0x54, 0x74, 0x8b, 0x7d,
                              0xdc, 0xb4, 0x3e, 0xf7, 0x5a, 0x0d, 0xbf, 0x3a, 0x0d, 0x26, 0x38,
                              0x1a, 0xf4, 0xeb, 0xa4, 0xa9, 0x8e, 0xaa, 0x9b, 0x4e, 0x6a};
  SecretKey key;
  std::memcpy(key.data(), secret, sizeof secret);
  CHECK(Identity::from_secret(std::move(key)).public_key() == expected);
}

TEST_CASE("secret key files that do not serve are refused, each with its reason") {
  Folder folder;
  const Identity identity = Identity::generate();
  REQUIRE(identity.save(folder.file("key")).ok());
  const std::string good = read(folder.file("key"));

  CHECK(Identity::load(folder.file("missing")).status().code() == absl::StatusCode::kNotFound);
  CHECK(Identity::load(folder.path.string()).status().code() == absl::StatusCode::kInvalidArgument);
  for (mode_t mode : {0640, 0604, 0660, 0644, 0601}) {
    const auto loaded = Identity::load(folder.write("open", good, mode));
    CHECK(loaded.status().code() == absl::StatusCode::kPermissionDenied);
    CHECK(std::string(loaded.status().message()).find("chmod 600") != std::string::npos);
  }
  // Public key files are open to all, which is not what is wrong with them here.
  const auto from_public =
      Identity::load(folder.write("public", format_public_key(identity.public_key()) + "\n", 0644));
  CHECK(from_public.status().code() == absl::StatusCode::kInvalidArgument);
  CHECK(std::string(from_public.status().message()).find("public key") != std::string::npos);

  const std::string key = good.substr(17, 43);
  for (const std::string& text :
       {std::string(), std::string("\n"), good.substr(0, good.size() - 2), good + "x", "x" + good,
        key, "infemeral-secret:" + key + "=", "infemeral-secret: " + key,
        "infemeral-secret:" + std::string(43, '*'), good + good, std::string(1000, 'x'),
        good + std::string(1000, '\n')}) {
    const auto loaded = Identity::load(folder.write("bad", text));
    CAPTURE(text);
    CHECK(loaded.status().code() == absl::StatusCode::kInvalidArgument);
    CHECK(std::string(loaded.status().message()).find(key) == std::string::npos);
  }
  // A line feed at the end is welcome, not needed.
  CHECK(Identity::load(folder.write("bare", good.substr(0, good.size() - 1))).ok());
  CHECK(Identity::load(folder.write("spaces", "\n " + good + "\r\n")).ok());
}

TEST_CASE("saving where nothing can be written names the file") {
  const absl::Status status = Identity::generate().save("/nonexistent/key");
  CHECK(status.code() == absl::StatusCode::kNotFound);
  CHECK(std::string(status.message()).find("/nonexistent/key") != std::string::npos);
}

TEST_CASE("public keys survive their text form") {
  for (int i = 0; i < 1000; ++i) {
    PublicKey key{};
    randombytes_buf(key.data(), key.size());
    const std::string text = format_public_key(key);
    REQUIRE(parse_public_key(" " + text + "\n").value() == key);
    // No other text names the same key.
    std::string other = text;
    const std::size_t at = 17 + randombytes_uniform(43);
    other[at] = other[at] == 'A' ? 'B' : 'A';
    const auto parsed = parse_public_key(other);
    REQUIRE((!parsed.ok() || *parsed != key));
  }
}

TEST_CASE("texts that are no public key are refused and not repeated") {
  Folder folder;
  REQUIRE(Identity::generate().save(folder.file("key")).ok());
  const std::string secret = read(folder.file("key"));
  const auto parsed = parse_public_key(secret);
  CHECK(parsed.status().code() == absl::StatusCode::kInvalidArgument);
  CHECK(std::string(parsed.status().message()).find("secret key") != std::string::npos);
  CHECK(std::string(parsed.status().message()).find(secret.substr(17, 43)) == std::string::npos);
  const std::string good = format_public_key(Identity::generate().public_key());
  for (const std::string& text :
       {std::string(), std::string("infemeral-public:"), good.substr(0, good.size() - 1),
        good + "A", good.substr(17), good + " " + good, good + std::string(1, '\0')}) {
    CHECK(parse_public_key(text).status().code() == absl::StatusCode::kInvalidArgument);
  }
}

TEST_CASE("lists of public keys") {
  Folder folder;
  const PublicKey a = Identity::generate().public_key();
  const PublicKey b = Identity::generate().public_key();
  const PublicKey c = Identity::generate().public_key();
  const auto keys = load_public_keys(folder.write("allow", "# clients\n\n" + format_public_key(a) +
                                                               " Ada's laptop\r\n  " +
                                                               format_public_key(b) + "\t# Bob"));
  REQUIRE(keys.ok());
  CHECK(*keys == std::vector<PublicKey>{a, b});
  CHECK(contains_key(*keys, a));
  CHECK(contains_key(*keys, b));
  CHECK(!contains_key(*keys, c));
  CHECK(!contains_key({}, a));

  const auto bad =
      load_public_keys(folder.write("bad", format_public_key(a) + "\n\nsomething else\n"));
  CHECK(bad.status().code() == absl::StatusCode::kInvalidArgument);
  CHECK(std::string(bad.status().message()).find("bad:3: ") != std::string::npos);
  CHECK(load_public_keys(folder.write("empty", "# none\n")).status().code() ==
        absl::StatusCode::kInvalidArgument);
  CHECK(load_public_keys(folder.file("missing")).status().code() == absl::StatusCode::kNotFound);
}

TEST_CASE("a key or a list of keys, and no key is taken for a path and repeated") {
  Folder folder;
  const PublicKey a = Identity::generate().public_key(), b = Identity::generate().public_key();
  std::string both = format_public_key(a);
  both.append("\n").append(format_public_key(b));
  CHECK(read_public_keys(folder.write("allow", both)).value() == std::vector<PublicKey>{a, b});
  std::string one = " ";
  one.append(format_public_key(a)).append("\n");
  CHECK(read_public_keys(one).value() == std::vector<PublicKey>{a});
  CHECK(read_public_keys(folder.file("missing")).status().code() == absl::StatusCode::kNotFound);

  REQUIRE(Identity::generate().save(folder.file("key")).ok());
  std::string mistyped = format_public_key(a);
  mistyped.pop_back();
  for (const std::string& text : {read(folder.file("key")), mistyped}) {
    const absl::Status status = read_public_keys(text).status();
    CHECK(status.code() == absl::StatusCode::kInvalidArgument);
    CHECK(status.message().find(text.substr(17, 40)) == absl::string_view::npos);
  }
}

}  // namespace infemeral
