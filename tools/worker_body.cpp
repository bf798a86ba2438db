#include "tools/worker_body.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "engine/json_file.h"
#include "engine/text.h"
#include "net/frames.h"
#include "tools/network_wait.h"

namespace infemeral {
namespace {

// A worker says hello before it starts this process.
constexpr int kHelloTimeoutMs = 10000;
// Of longer runs nobody notices 100 us.
constexpr std::chrono::milliseconds kAwaitedRun{50};
// What a token takes the client and a fast network, at most; a session that is away for longer is
// not waited for.
constexpr std::chrono::milliseconds kAwaitedPause{2};

using Clock = std::chrono::steady_clock;

absl::Status ended() {
  return absl::UnavailableError("the process that runs the layers has ended");
}

absl::Status damaged(std::string_view what) {
  return absl::DataLossError(cat("the process that runs the layers answers with ", what,
                                 "; are engine_serve and serve_torch of the same version?"));
}

class Descriptor {
 public:
  explicit Descriptor(int value) : value_(value) {}
  Descriptor(Descriptor&& other) noexcept : value_(std::exchange(other.value_, -1)) {}
  Descriptor& operator=(Descriptor&&) = delete;
  ~Descriptor() {
    if (value_ >= 0) ::close(value_);
  }

  int get() const { return value_; }

 private:
  int value_;
};

// The length of the message, of which as much as fits is in `buffer`; 0 when the other end is gone.
std::size_t receive(int socket, void* buffer, std::size_t size) {
  ssize_t n = 0;
  do {
    n = ::recv(socket, buffer, size, MSG_TRUNC);
  } while (n < 0 && errno == EINTR);
  return n > 0 ? static_cast<std::size_t>(n) : 0;
}

// False when the other end is gone.
bool send(int socket, const msghdr& message) {
  ssize_t n = 0;
  do {
    n = ::sendmsg(socket, &message, MSG_NOSIGNAL);
  } while (n < 0 && errno == EINTR);
  return n >= 0;
}

// As receive(), of a message that is expected around `due`: a thread that sleeps is awake up to 100
// us late, so from an eighth of the way before that to an eighth after it, this one looks by
// itself.
std::size_t receive_around(int socket, void* buffer, std::size_t size, Clock::time_point begin,
                           Clock::duration expected) {
  const auto nanoseconds = std::chrono::nanoseconds(expected * 7 / 8).count();
  const timespec sleep{nanoseconds / 1'000'000'000, nanoseconds % 1'000'000'000};
  pollfd readable{socket, POLLIN, 0};
  (void)::ppoll(&readable, 1, &sleep, nullptr);
  while (Clock::now() - begin < expected * 9 / 8) {
    const ssize_t n = ::recv(socket, buffer, size, MSG_TRUNC | MSG_DONTWAIT);
    if (n >= 0) return static_cast<std::size_t>(n);
    if (errno != EAGAIN && errno != EINTR) return 0;
  }
  return receive(socket, buffer, size);
}

bool send(int socket, WorkerMessage message) {
  iovec part{&message, sizeof message};
  msghdr header{};
  header.msg_iov = &part;
  header.msg_iovlen = 1;
  return send(socket, header);
}

// Memory of its own descriptor, which nobody can make shorter: reading it never faults.
class Area {
 public:
  static absl::StatusOr<std::unique_ptr<Area>> make(std::size_t size) {
    const int descriptor = ::memfd_create("infemeral-rows", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (descriptor < 0) return errno_status(errno, "cannot make", "memory for rows");
    auto area = std::make_unique<Area>(descriptor, size);
    constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
    if (::ftruncate(descriptor, static_cast<off_t>(size)) != 0 ||
        ::fcntl(descriptor, F_ADD_SEALS, kSeals) != 0) {
      return errno_status(errno, "cannot make", "memory for rows");
    }
    void* data = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    if (data == MAP_FAILED) return errno_status(errno, "cannot map", "memory for rows");
    area->data_ = static_cast<std::byte*>(data);
    return area;
  }

  Area(int descriptor, std::size_t size) : descriptor_(descriptor), size_(size) {}
  ~Area() {
    if (data_ != nullptr) ::munmap(data_, size_);
  }
  Area(const Area&) = delete;
  Area& operator=(const Area&) = delete;

  int descriptor() const { return descriptor_.get(); }
  std::byte* data() const { return data_; }

 private:
  const Descriptor descriptor_;
  const std::size_t size_;
  std::byte* data_ = nullptr;
};

bool send_setup(int socket, WorkerSetup setup, int descriptor) {
  iovec part{&setup, sizeof setup};
  alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof descriptor)> control{};
  msghdr header{};
  header.msg_iov = &part;
  header.msg_iovlen = 1;
  header.msg_control = control.data();
  header.msg_controllen = control.size();
  cmsghdr* rights = CMSG_FIRSTHDR(&header);
  rights->cmsg_level = SOL_SOCKET;
  rights->cmsg_type = SCM_RIGHTS;
  rights->cmsg_len = CMSG_LEN(sizeof descriptor);
  std::memcpy(CMSG_DATA(rights), &descriptor, sizeof descriptor);
  return send(socket, header);
}

struct Greeting {
  BodyInfo info;
  bool spares_processors;
};

absl::StatusOr<Greeting> read_hello(int socket) {
  pollfd readable{socket, POLLIN, 0};
  if (::poll(&readable, 1, kHelloTimeoutMs) == 0) {
    return absl::UnavailableError("no worker says hello; serve_torch --front starts one");
  }
  std::array<char, sizeof(WorkerHello) + kMaxTextBytes> buffer{};
  const std::size_t size = receive(socket, buffer.data(), buffer.size());
  if (size == 0) return ended();
  WorkerHello hello;
  if (size < sizeof hello || size > buffer.size()) return damaged("a hello of another size");
  std::memcpy(&hello, buffer.data(), sizeof hello);
  if (hello.magic != kWorkerMagic) return damaged("something else than a hello");
  if (hello.version != kWorkerVersion) {
    return absl::FailedPreconditionError(
        cat("the worker speaks version ", hello.version, " and engine_serve version ",
            kWorkerVersion, "; use serve_torch and engine_serve of the same release"));
  }
  if (hello.hidden_size < 1 || hello.hidden_size > kMaxHiddenSize || hello.max_context < 1) {
    return damaged(
        cat("a hidden size of ", hello.hidden_size, " and a context of ", hello.max_context));
  }
  return Greeting{{.description = std::string(buffer.data() + sizeof hello, size - sizeof hello),
                   .hidden_size = hello.hidden_size,
                   .max_context = hello.max_context,
                   .kv_bytes_per_token = hello.kv_bytes_per_token,
                   .model_fingerprint = hello.model_fingerprint,
                   .cloak_commitment = hello.cloak_commitment},
                  hello.spares_processors == 1};
}

class WorkerBody final : public Body {
 public:
  WorkerBody(Descriptor socket, std::unique_ptr<Area> area, Greeting worker, WorkerOptions options)
      : socket_(std::move(socket)),
        info_(std::move(worker.info)),
        spares_processors_(worker.spares_processors),
        options_(std::move(options)),
        layout_(options_.max_rows, info_.hidden_size),
        area_(std::move(area)),
        watcher_([this] { watch(); }) {}

  ~WorkerBody() override {
    closing_ = true;
    ::shutdown(socket_.get(), SHUT_RDWR);
    watcher_.join();
  }

  const BodyInfo& info() const override { return info_; }
  absl::StatusOr<std::unique_ptr<BodySession>> new_session() override;
  void run(std::span<BodyStep> steps) override;

  void release(std::uint64_t session) {
    send(socket_.get(), {WorkerMessage::kRelease, 0, session});
  }

 private:
  absl::Status check(const BodyStep& step) const;
  void run_together(std::span<BodyStep* const> steps);
  void place(std::span<BodyStep* const> steps);
  absl::Status exchange(std::uint32_t count, bool decodes);
  absl::Status take(std::size_t index, std::size_t first_row, BodyStep& step);
  absl::Status end(const absl::Status& reason);
  void watch();

  template <typename T>
  T* at(std::size_t part, std::size_t index = 0) const {
    return reinterpret_cast<T*>(area_->data() + part) + index;
  }

  const Descriptor socket_;
  const BodyInfo info_;
  const bool spares_processors_;
  const WorkerOptions options_;
  const WorkerLayout layout_;
  const std::unique_ptr<Area> area_;
  std::atomic<std::uint64_t> sessions_ = 0;  // made so far
  std::uint64_t runs_ = 0;
  Clock::duration decode_run_{};  // how long the last run of single rows took
  std::atomic<bool> closing_ = false;
  std::once_flag end_;
  std::atomic<bool> ended_ = false;
  std::thread watcher_;
};

class WorkerSession final : public BodySession {
 public:
  WorkerSession(WorkerBody& owner, std::uint64_t number) : body(owner), id(number) {}
  ~WorkerSession() override {
    if (known) body.release(id);
  }

  std::uint32_t kv_len() const override { return held; }
  std::size_t kv_bytes() const override { return held * body.info().kv_bytes_per_token; }

  WorkerBody& body;
  const std::uint64_t id;
  bool known = false;  // to the worker
  std::uint32_t held = 0;
};

absl::StatusOr<std::unique_ptr<BodySession>> WorkerBody::new_session() {
  return std::make_unique<WorkerSession>(*this, ++sessions_);
}

absl::Status WorkerBody::check(const BodyStep& step) const {
  const auto* session = dynamic_cast<WorkerSession*>(step.session);
  if (session == nullptr || &session->body != this) {
    return absl::InvalidArgumentError("the step's session was not made by this body");
  }
  const std::size_t h = info_.hidden_size;
  const std::size_t out_rows = output_rows(step.wanted, step.rows);
  if (step.rows < 1 || step.rows > options_.max_rows || step.states.size() != step.rows * h ||
      step.out.size() != out_rows * h) {
    return absl::InvalidArgumentError(
        cat("a step of ", step.rows, " rows has ", step.states.size(), " numbers and room for ",
            step.out.size(), "; at a hidden size of ", h, " it needs 1 to ", options_.max_rows,
            " rows, ", step.rows * h, " and ", out_rows * h));
  }
  return absl::OkStatus();
}

void WorkerBody::run(std::span<BodyStep> steps) {
  std::vector<BodyStep*> ready;
  for (BodyStep& step : steps) {
    step.status = check(step);
    if (step.status.ok()) ready.push_back(&step);
  }
  // Single rows first, so that they stay together where not all steps fit: they share one pass over
  // the weights.
  std::stable_sort(ready.begin(), ready.end(),
                   [](const BodyStep* a, const BodyStep* b) { return a->rows < b->rows; });
  for (std::span<BodyStep* const> rest = ready; !rest.empty();) {
    std::size_t n = 0;
    for (std::size_t rows = rest[0]->rows; rows <= options_.max_rows;) {
      if (++n == rest.size()) break;
      rows += rest[n]->rows;
    }
    run_together(rest.first(n));
    rest = rest.subspan(n);
  }
}

void WorkerBody::run_together(std::span<BodyStep* const> steps) {
  place(steps);
  const bool decodes =
      std::all_of(steps.begin(), steps.end(), [](const BodyStep* step) { return step->rows == 1; });
  absl::Status status = exchange(static_cast<std::uint32_t>(steps.size()), decodes);
  std::size_t row = 0;
  for (std::size_t i = 0; i < steps.size(); ++i) {
    if (status.ok()) status = take(i, row, *steps[i]);
    if (!status.ok()) steps[i]->status = status;
    row += steps[i]->rows;
  }
}

void WorkerBody::place(std::span<BodyStep* const> steps) {
  const std::size_t h = info_.hidden_size;
  std::size_t row = 0;
  for (std::size_t i = 0; i < steps.size(); ++i) {
    const BodyStep& step = *steps[i];
    auto& session = static_cast<WorkerSession&>(*step.session);
    session.known = true;
    *at<WorkerStep>(0, i) = {session.id, step.start_pos, step.rows,
                             static_cast<std::uint32_t>(step.wanted), 0};
    std::copy(step.states.begin(), step.states.end(), at<float>(layout_.states, row * h));
    row += step.rows;
  }
}

absl::Status WorkerBody::exchange(std::uint32_t count, bool decodes) {
  const WorkerMessage question{WorkerMessage::kRun, count, ++runs_};
  const Clock::time_point begin = Clock::now();
  if (ended_ || !send(socket_.get(), question)) return end(ended());
  const bool awaited = decodes && decode_run_ < kAwaitedRun;
  // From now until the step after this one should have come.
  if (awaited && spares_processors_) stay_awake_until(begin + decode_run_ * 9 / 8 + kAwaitedPause);
  WorkerMessage answer;
  const std::size_t size =
      awaited ? receive_around(socket_.get(), &answer, sizeof answer, begin, decode_run_)
              : receive(socket_.get(), &answer, sizeof answer);
  if (decodes) decode_run_ = Clock::now() - begin;
  if (size == 0) return end(ended());
  if (size != sizeof answer || answer.kind != WorkerMessage::kRan ||
      answer.count != question.count || answer.number != question.number) {
    return end(damaged("something else than the results of the run"));
  }
  return absl::OkStatus();
}

// Not OK when the worker is not to be believed any more; what it says of the step is in the step.
absl::Status WorkerBody::take(std::size_t index, std::size_t first_row, BodyStep& step) {
  // A copy: what is checked cannot change any more.
  const WorkerResult result = *at<WorkerResult>(layout_.results, index);
  const auto code = static_cast<absl::StatusCode>(result.code);
  auto& session = static_cast<WorkerSession&>(*step.session);
  switch (code) {
    case absl::StatusCode::kOk:
      if (result.kv_len != step.start_pos + step.rows) {
        return end(damaged("an impossible number of positions"));
      }
      std::copy_n(at<float>(layout_.out, first_row * info_.hidden_size), step.out.size(),
                  step.out.begin());
      break;
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kNotFound:
    case absl::StatusCode::kResourceExhausted:
    case absl::StatusCode::kFailedPrecondition:
    case absl::StatusCode::kInternal:
      if (result.kv_len > info_.max_context) {
        return end(damaged("an impossible number of positions"));
      }
      step.status = absl::Status(
          code,
          absl::string_view(result.message, ::strnlen(result.message, sizeof result.message)));
      break;
    default:
      return end(damaged("an impossible code"));
  }
  session.held = result.kv_len;
  return absl::OkStatus();
}

// What the steps are answered with; the reason is the operator's.
absl::Status WorkerBody::end(const absl::Status& reason) {
  std::call_once(end_, [&] {
    ended_ = true;
    // Nobody waits for it any more, here or there.
    ::shutdown(socket_.get(), SHUT_RDWR);
    if (options_.on_end) options_.on_end(reason);
  });
  return ended();
}

// An end between two runs, which nobody would notice before the next one.
void WorkerBody::watch() {
  pollfd hung_up{socket_.get(), POLLRDHUP, 0};
  while (::poll(&hung_up, 1, -1) <= 0) {
  }
  if (!closing_) (void)end(ended());
}

}  // namespace

WorkerLayout::WorkerLayout(std::size_t max_rows, std::size_t hidden_size) {
  const auto behind = [](std::size_t begin, std::size_t bytes) {
    return (begin + bytes + 63) / 64 * 64;
  };
  const std::size_t row_bytes = hidden_size * sizeof(float);
  results = behind(0, max_rows * sizeof(WorkerStep));
  states = behind(results, max_rows * sizeof(WorkerResult));
  out = behind(states, max_rows * row_bytes);
  size = behind(out, max_rows * row_bytes);
}

absl::StatusOr<std::unique_ptr<Body>> open_worker_body(int descriptor, WorkerOptions options) {
  int type = 0;
  socklen_t size = sizeof type;
  if (::getsockopt(descriptor, SOL_SOCKET, SO_TYPE, &type, &size) != 0 || type != SOCK_SEQPACKET) {
    return absl::InvalidArgumentError(
        cat("descriptor ", descriptor, " is no socket of a worker; serve_torch --front makes one"));
  }
  Descriptor socket(descriptor);
  absl::StatusOr<Greeting> worker = read_hello(descriptor);
  if (!worker.ok()) return worker.status();
  const WorkerLayout layout(options.max_rows, worker->info.hidden_size);
  auto area = Area::make(layout.size);
  if (!area.ok()) return area.status();
  const WorkerSetup setup{.max_rows = options.max_rows, .area_bytes = layout.size};
  if (!send_setup(descriptor, setup, (*area)->descriptor())) return ended();
  return std::make_unique<WorkerBody>(std::move(socket), *std::move(area), *std::move(worker),
                                      std::move(options));
}

}  // namespace infemeral
