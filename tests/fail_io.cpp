// A disk that fails: preloaded, makes the n-th call fail of those that change files. In the
// environment:
//
//   FAIL_AT      n, from 1; 0 only counts
//   FAIL_WITH    an errno; 0 makes every write from there on a short one, which is no error
//   FAIL_LOG     a file that is written when the process ends: the calls that came, and the one
//                that failed
//
// stdio writes inside the C library, where no preload reaches: its fflush() stands for it.
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdarg>
#include <cstdlib>
#include <cstring>

namespace {

std::atomic<long> calls{0};
std::atomic<const char*> failed{nullptr};

long number(const char* name) {
  const char* text = getenv(name);
  return text == nullptr ? 0 : atol(text);
}

long fail_at() {
  static const long at = number("FAIL_AT");
  return at;
}
int fail_with() {
  static const int with = static_cast<int>(number("FAIL_WITH"));
  return with;
}

// Counts a call; whether it has to fail. errno is set then.
bool fails(const char* what) {
  if (calls.fetch_add(1) + 1 != fail_at() || fail_with() == 0) return false;
  failed = what;
  errno = fail_with();
  return true;
}

bool writes_short() {
  return fail_at() > 0 && fail_with() == 0 && calls.load() >= fail_at();
}

template <typename F>
F* real(const char* name) {
  return reinterpret_cast<F*>(dlsym(RTLD_NEXT, name));
}

// Files that can be written; not sockets, pipes and terminals.
bool is_output(int fd) {
  struct stat info {};
  const int flags = fcntl(fd, F_GETFL);
  return flags >= 0 && (flags & O_ACCMODE) != O_RDONLY && fstat(fd, &info) == 0 &&
         S_ISREG(info.st_mode);
}

struct Log {
  ~Log() {
    const char* path = getenv("FAIL_LOG");
    if (path == nullptr) return;
    const int fd = static_cast<int>(syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT, 0644));
    char line[128];
    const char* what = failed.load();
    const int size =
        snprintf(line, sizeof line, "%ld %s\n", calls.load(), what == nullptr ? "-" : what);
    (void)!syscall(SYS_write, fd, line, size);
    syscall(SYS_close, fd);
  }
};
const Log log_at_exit;

template <typename Open>
int open_with(const char* name, const char* path, int flags, mode_t mode) {
  if ((flags & O_ACCMODE) != O_RDONLY && strncmp(path, "/dev/", 5) != 0 && fails("open")) return -1;
  return real<Open>(name)(path, flags, mode);
}

mode_t mode_of(int flags, va_list arguments) {
  return (flags & O_CREAT) != 0 ? va_arg(arguments, mode_t) : 0;
}

}  // namespace

extern "C" {

int open(const char* path, int flags, ...) {
  va_list arguments;
  va_start(arguments, flags);
  const mode_t mode = mode_of(flags, arguments);
  va_end(arguments);
  return open_with<int(const char*, int, mode_t)>("open", path, flags, mode);
}

int open64(const char* path, int flags, ...) {
  va_list arguments;
  va_start(arguments, flags);
  const mode_t mode = mode_of(flags, arguments);
  va_end(arguments);
  return open_with<int(const char*, int, mode_t)>("open64", path, flags, mode);
}

ssize_t write(int fd, const void* data, size_t size) {
  if (is_output(fd)) {
    if (fails("write")) return -1;
    if (writes_short()) size = (size + 1) / 2;
  }
  return real<ssize_t(int, const void*, size_t)>("write")(fd, data, size);
}

ssize_t sendfile(int to, int from, off_t* offset, size_t size) {
  if (is_output(to) && fails("sendfile")) return -1;
  return real<ssize_t(int, int, off_t*, size_t)>("sendfile")(to, from, offset, size);
}

int fsync(int fd) {
  if (fails("fsync")) return -1;
  return real<int(int)>("fsync")(fd);
}

int ftruncate(int fd, off_t size) {
  if (fails("ftruncate")) return -1;
  return real<int(int, off_t)>("ftruncate")(fd, size);
}

int close(int fd) {
  // As close(2) does it: the descriptor is gone all the same.
  const bool bad = is_output(fd) && fails("close");
  const int error = errno;
  const int result = real<int(int)>("close")(fd);
  if (bad) errno = error;
  return bad ? -1 : result;
}

int rename(const char* from, const char* to) {
  if (fails("rename")) return -1;
  return real<int(const char*, const char*)>("rename")(from, to);
}

int mkdir(const char* path, mode_t mode) {
  if (fails("mkdir")) return -1;
  return real<int(const char*, mode_t)>("mkdir")(path, mode);
}

int fflush(FILE* file) {
  if (file != nullptr && is_output(fileno(file)) && fails("fflush")) return EOF;
  return real<int(FILE*)>("fflush")(file);
}

int fclose(FILE* file) {
  const bool bad = is_output(fileno(file)) && fails("fclose");
  const int error = errno;
  const int result = real<int(FILE*)>("fclose")(file);
  if (bad) errno = error;
  return bad ? EOF : result;
}

}  // extern "C"
