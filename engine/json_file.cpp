#include "engine/json_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <new>
#include <nlohmann/json.hpp>
#include <system_error>

#include "absl/cleanup/cleanup.h"
#include "engine/text.h"

namespace infemeral {
namespace {

// The deepest nesting of brackets outside strings; enough for a bound, the parser checks the rest.
std::size_t json_depth(std::string_view text) {
  std::size_t depth = 0, deepest = 0;
  bool in_string = false;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') ++i;
      if (c == '"') in_string = false;
    } else if (c == '"') {
      in_string = true;
    } else if (c == '{' || c == '[') {
      deepest = std::max(deepest, ++depth);
    } else if ((c == '}' || c == ']') && depth > 0) {
      --depth;
    }
  }
  return deepest;
}

}  // namespace

absl::StatusOr<nlohmann::json> parse_json(std::string_view text, std::string_view name) {
  if (json_depth(text) > kMaxJsonDepth) {
    return absl::InvalidArgumentError(
        cat(name, ": the JSON is nested deeper than ", kMaxJsonDepth, " levels"));
  }
  try {
    return nlohmann::json::parse(text);
  } catch (const std::bad_alloc&) {
    return absl::ResourceExhaustedError(cat(name, ": out of memory while reading it"));
  } catch (const std::exception& e) {
    constexpr std::size_t kShown = 200;  // what() quotes the last token, however long it is
    return absl::InvalidArgumentError(
        cat(name, ": not valid JSON: ", std::string_view(e.what()).substr(0, kShown)));
  }
}

absl::Status errno_status(int error, std::string_view what, const std::filesystem::path& file) {
  const std::string message =
      cat(what, " ", file.string(), ": ", std::generic_category().message(error));
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
    case EFBIG:
    case ENOMEM:
    case EMFILE:
      return absl::ResourceExhaustedError(message);
    case EEXIST:
      return absl::AlreadyExistsError(message);
    case EISDIR:
      return absl::InvalidArgumentError(message);
    default:
      return absl::DataLossError(message);
  }
}

absl::StatusOr<std::string> read_text_file(const std::filesystem::path& file,
                                           std::size_t max_bytes) {
  const int fd = ::open(file.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return errno_status(errno, "cannot open", file);
  const absl::Cleanup close_file = [fd] { ::close(fd); };
  std::string text;
  char buffer[1 << 16];
  while (true) {
    const ssize_t n = ::read(fd, buffer, sizeof buffer);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return errno_status(errno, "cannot read", file);
    if (n == 0) return text;
    if (static_cast<std::size_t>(n) > max_bytes - text.size()) {
      return absl::ResourceExhaustedError(
          cat(file.string(), " is larger than the limit of ", max_bytes, " bytes"));
    }
    text.append(buffer, static_cast<std::size_t>(n));
  }
}

namespace {

absl::Status write_all(int fd, const std::filesystem::path& file, std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t n = ::write(fd, bytes.data(), bytes.size());
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return errno_status(errno, "cannot write", file);
    bytes.remove_prefix(static_cast<std::size_t>(n));
  }
  return absl::OkStatus();
}

// Pipes and devices: there is nothing to rename.
absl::Status write_in_place(const std::filesystem::path& file, std::string_view bytes) {
  const int fd = ::open(file.c_str(), O_WRONLY | O_CLOEXEC);
  if (fd < 0) return errno_status(errno, "cannot open", file);
  absl::Status status = write_all(fd, file, bytes);
  if (::close(fd) != 0 && status.ok()) status = errno_status(errno, "cannot write", file);
  return status;
}

}  // namespace

absl::Status write_new_file(const std::filesystem::path& file, std::string_view bytes,
                            unsigned mode) {
  const int fd = ::open(file.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, mode);
  if (fd < 0) return errno_status(errno, "cannot create", file);
  absl::Status status = write_all(fd, file, bytes);
  if (status.ok() && ::fsync(fd) != 0) status = errno_status(errno, "cannot write", file);
  if (::close(fd) != 0 && status.ok()) status = errno_status(errno, "cannot write", file);
  if (!status.ok()) ::unlink(file.c_str());
  return status;
}

absl::Status replace_file(const std::filesystem::path& target, std::string_view bytes) {
  std::error_code error;
  const auto type = std::filesystem::status(target, error).type();
  if (type != std::filesystem::file_type::regular &&
      type != std::filesystem::file_type::not_found) {
    return write_in_place(target, bytes);
  }
  // A symbolic link stays: what it points to is replaced.
  const std::filesystem::path file = std::filesystem::weakly_canonical(target, error);
  if (error) return errno_status(error.value(), "cannot write", target);
  const std::filesystem::path temporary =
      file.parent_path() / cat(".", file.filename().string(), ".", ::getpid());
  if (auto status = write_new_file(temporary, bytes, 0644); !status.ok()) return status;
  if (::rename(temporary.c_str(), file.c_str()) != 0) {
    const int rename_error = errno;
    ::unlink(temporary.c_str());
    return errno_status(rename_error, "cannot replace", file);
  }
  return absl::OkStatus();
}

}  // namespace infemeral
