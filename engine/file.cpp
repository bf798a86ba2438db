#include "engine/file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

#include "engine/str_cat.h"

namespace infemeral {
namespace {

class FileDescriptor {
 public:
  explicit FileDescriptor(int fd) : fd_(fd) {}
  ~FileDescriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  FileDescriptor(const FileDescriptor&) = delete;
  FileDescriptor& operator=(const FileDescriptor&) = delete;
  int get() const { return fd_; }
  int close() { return ::close(std::exchange(fd_, -1)); }

 private:
  int fd_;
};

}  // namespace

absl::Status file_error(std::string_view action, const std::filesystem::path& file, int error) {
  const std::string message =
      str_cat("cannot ", action, " ", file.string(), ": ", std::generic_category().message(error));
  switch (error) {
    case ENOENT:
    case ENOTDIR:
      return absl::NotFoundError(message);
    case EACCES:
    case EPERM:
    case EROFS:
      return absl::PermissionDeniedError(message);
    case ENOSPC:
    case EDQUOT:
      return absl::ResourceExhaustedError(message);
    default:
      return absl::InvalidArgumentError(message);
  }
}

absl::StatusOr<std::string> read_text_file(const std::filesystem::path& file,
                                           std::size_t max_bytes) {
  FileDescriptor fd(::open(file.c_str(), O_RDONLY | O_CLOEXEC));
  if (fd.get() < 0) return file_error("open", file, errno);
  // The size is found by reading, not by asking: pipes and /dev/stdin have none.
  std::string text;
  char buffer[1 << 16];
  while (true) {
    const ssize_t n = ::read(fd.get(), buffer, sizeof(buffer));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return file_error("read", file, errno);
    if (n == 0) return text;
    text.append(buffer, static_cast<std::size_t>(n));
    if (text.size() > max_bytes) {
      return absl::InvalidArgumentError(
          str_cat(file.string(), " is larger than the ", max_bytes, " bytes allowed for it"));
    }
  }
}

absl::Status write_text_file(const std::filesystem::path& file, std::string_view text) {
  const std::filesystem::path temporary =
      file.parent_path() / str_cat(".", file.filename().string(), ".tmp", ::getpid());
  const auto fail = [&](std::string_view action) {
    const int error = errno;
    ::unlink(temporary.c_str());
    return file_error(action, file, error);
  };
  FileDescriptor fd(::open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644));
  if (fd.get() < 0) return file_error("write", file, errno);
  for (std::string_view rest = text; !rest.empty();) {
    const ssize_t n = ::write(fd.get(), rest.data(), rest.size());
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return fail("write");
    rest.remove_prefix(static_cast<std::size_t>(n));
  }
  if (::fsync(fd.get()) != 0 && errno != EINVAL) return fail("write");
  if (fd.close() != 0) return fail("write");
  if (::rename(temporary.c_str(), file.c_str()) != 0) return fail("replace");
  return absl::OkStatus();
}

}  // namespace infemeral
