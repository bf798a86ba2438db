#include "tools/result_writer.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <utility>

#include "engine/json_file.h"
#include "engine/text.h"

namespace infemeral {

absl::StatusOr<std::unique_ptr<ResultWriter>> ResultWriter::open(
    const ResultWriterOptions& options) {
  std::unique_ptr<ResultWriter> writer(new ResultWriter);
  writer->show_text_ = options.stream_text || options.file.empty();
  if (options.append && (options.file.empty() || options.file == "-")) {
    return absl::InvalidArgumentError("--continue needs --output with the file to go on with");
  }
  if (options.file.empty()) return writer;
  writer->name_ = options.file;
  if (options.file == "-") {
    if (options.stream_text) {
      return absl::InvalidArgumentError("--stream and --output - would both write to stdout");
    }
    writer->name_ = "stdout";
    writer->lines_ = stdout;
    return writer;
  }
  int fd = ::open(options.file.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
  writer->created_ = fd >= 0;
  if (fd < 0 && errno == EEXIST && (options.overwrite || options.append)) {
    fd = ::open(options.file.c_str(), O_WRONLY | O_CLOEXEC);
  } else if (fd < 0 && errno == EEXIST) {
    return absl::AlreadyExistsError(
        cat(options.file,
            " exists; choose another --output, go on with it (--continue) or give --overwrite"));
  }
  if (fd < 0) return errno_status(errno, "cannot write", options.file);
  writer->lines_ = ::fdopen(fd, "w");
  writer->owns_lines_ = true;
  struct stat file {};
  const bool regular = ::fstat(fd, &file) == 0 && S_ISREG(file.st_mode);
  if (options.append && !regular) {
    return absl::InvalidArgumentError(cat(options.file, " is not a file that can be continued"));
  }
  // Held until the file is closed, also by a run that is killed.
  if (regular && ::flock(fd, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
    return absl::FailedPreconditionError(cat(options.file, " is being written by another run"));
  }
  return writer;
}

ResultWriter::~ResultWriter() {
  if (!owns_lines_ || lines_ == nullptr) return;
  std::fclose(lines_);
  if (created_ && !started_) ::unlink(name_.c_str());
}

void ResultWriter::keep(std::uint64_t bytes, bool end_line) {
  kept_ = bytes;
  end_line_ = end_line;
}

bool ResultWriter::text_on_terminal() const {
  return show_text_ && ::isatty(STDOUT_FILENO) != 0;
}

void ResultWriter::text(std::string_view piece) {
  if (!show_text_) return;
  std::fwrite(piece.data(), 1, piece.size(), stdout);
  std::fflush(stdout);  // a failure stays in the stream's error flag until result()
}

absl::Status ResultWriter::check(std::FILE* file, std::string_view name) const {
  if (std::fflush(file) != 0 || std::ferror(file) != 0) {
    return errno_status(errno != 0 ? errno : EIO, "cannot write to", std::string(name));
  }
  return absl::OkStatus();
}

absl::Status ResultWriter::start_lines() {
  if (std::exchange(started_, true) || !owns_lines_ || created_) return absl::OkStatus();
  // Devices and pipes (EINVAL) have nothing to cut.
  if (::ftruncate(::fileno(lines_), static_cast<off_t>(kept_)) != 0 && errno != EINVAL) {
    return errno_status(errno, "cannot write to", name_);
  }
  if (kept_ > 0 && std::fseek(lines_, static_cast<long>(kept_), SEEK_SET) != 0) {
    return errno_status(errno, "cannot write to", name_);
  }
  if (end_line_) std::fputc('\n', lines_);
  return absl::OkStatus();
}

absl::Status ResultWriter::result(std::string_view line, bool ok) {
  if (show_text_ && ok) std::fputc('\n', stdout);
  if (show_text_) {
    if (auto status = check(stdout, "stdout"); !status.ok()) return status;
  }
  if (lines_ == nullptr) return absl::OkStatus();
  if (auto status = start_lines(); !status.ok()) return status;
  std::fwrite(line.data(), 1, line.size(), lines_);
  std::fputc('\n', lines_);
  return check(lines_, name_);
}

absl::Status ResultWriter::finish() {
  if (lines_ == nullptr) return absl::OkStatus();
  if (auto status = check(lines_, name_); !status.ok() || !owns_lines_) return status;
  int error = ::fsync(::fileno(lines_)) != 0 && errno != EINVAL ? errno : 0;
  if (std::fclose(std::exchange(lines_, nullptr)) != 0 && error == 0) error = errno;
  return error == 0 ? absl::OkStatus() : errno_status(error, "cannot write to", name_);
}

}  // namespace infemeral
