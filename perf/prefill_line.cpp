// Time to the first row of a long prompt over a slow, long line: the pipeline with its real cloak,
// encryption and gRPC against the time that the same bytes need alone, and against the original's
// scheme (float32 both ways, every row back, one call). The body computes nothing.
//
// "table" instead of "cloak" takes the rows from a small table, so that a line can be filled that
// is faster than this machine cloaks; the body then checks every value that arrives.
//
// usage: prefill_line [ROUNDS [PROMPT_TOKENS [HIDDEN_SIZE [RTT_MS [MBIT_PER_S [cloak|table]]]]]]
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <thread>

#include "cpu/client_backend.h"
#include "engine/float16.h"
#include "engine/pipeline.h"
#include "engine/safetensors.h"
#include "engine/text.h"
#include "net/body_server.h"
#include "net/client_link.h"
#include "perf/bench_bodies.h"
#include "tests/line.h"
#include "tests/tiny_model.h"

namespace infemeral {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::size_t kVocab = 512;

void check(const absl::Status& status) {
  if (!status.ok()) throw std::runtime_error(status.ToString());
}
template <typename T>
T value(absl::StatusOr<T> result) {
  check(result.status());
  return *std::move(result);
}

double ms_since(Clock::time_point begin) {
  return std::chrono::duration<double, std::milli>(Clock::now() - begin).count();
}

// A client folder with random tables and a real cloak.
ClientManifest make_client(const std::filesystem::path& folder, std::size_t hidden) {
  std::mt19937 random(std::random_device{}());
  std::normal_distribution<float> normal(0, 1);
  const CloakSeed seed = CloakSeed::random();
  std::filesystem::create_directories(folder);
  check(seed.save(folder / "cloak.key"));
  const ClientManifest manifest{.model_type = "llama",
                                .hidden_size = hidden,
                                .vocab_size = kVocab,
                                .max_context = 1 << 17,
                                .tied_embeddings = true,
                                .cloak_mode = CloakMode::kLazy,
                                .cloak_commitment = seed.commitment()};
  check(save_client_manifest(manifest, folder));
  std::vector<std::uint16_t> embed(kVocab * hidden);
  for (auto& x : embed) x = f32_to_f16(normal(random));
  const std::vector<float> gain(hidden, 1.0f);
  auto writer =
      value(SafetensorsWriter::create(folder / "client.safetensors",
                                      {{"final_norm.weight", Dtype::kF32, {hidden}},
                                       {"embed_tokens.weight", Dtype::kF16, {kVocab, hidden}}},
                                      {{"tied_embeddings", "true"}}));
  check(writer->write(std::as_bytes(std::span(gain))));
  check(writer->write(std::as_bytes(std::span(embed))));
  check(writer->finish());
  return manifest;
}

// A row for every token, as it travels, and as the body must find it.
class TableBackend final : public ClientBackend {
 public:
  explicit TableBackend(std::size_t hidden) : hidden_(hidden) {
    std::mt19937_64 random(std::random_device{}());
    for (const WireDtype dtype : {WireDtype::kF16, WireDtype::kI8}) {
      for (auto& row : table(dtype)) row = random_row(dtype, hidden, random);
    }
  }
  std::string_view name() const override { return "table"; }
  std::size_t hidden_size() const override { return hidden_; }
  std::size_t vocab_size() const override { return kVocab; }
  MemoryUse memory() const override { return {}; }

  absl::Status embed(std::span<const std::int32_t> ids, WireDtype dtype, std::span<std::byte> out,
                     PhaseTimes& times) override {
    PhaseClock clock;
    for (std::size_t i = 0; i < ids.size(); ++i) {
      const std::vector<std::byte>& row = table(dtype)[static_cast<std::size_t>(ids[i]) % kRows];
      std::copy(row.begin(), row.end(), out.begin() + static_cast<std::ptrdiff_t>(i * row.size()));
    }
    clock.lap(times.cloak_ms);
    return absl::OkStatus();
  }
  absl::Status next_tokens(std::span<const std::byte>, WireDtype, std::span<const SampleRequest>,
                           std::span<std::int32_t> tokens, PhaseTimes&) override {
    std::fill(tokens.begin(), tokens.end(), 0);
    return absl::OkStatus();
  }
  absl::Status logits(std::span<const std::byte>, WireDtype, std::span<float>) override {
    return absl::UnimplementedError("a table has no logits");
  }

  std::vector<std::vector<float>> decoded(WireDtype dtype) {
    std::vector<std::vector<float>> rows;
    for (const auto& row : table(dtype)) {
      rows.emplace_back(hidden_);
      decode_wire_row(dtype, row.data(), rows.back());
    }
    return rows;
  }

  static constexpr std::size_t kRows = 64;

 private:
  std::array<std::vector<std::byte>, kRows>& table(WireDtype dtype) {
    return dtype == WireDtype::kF16 ? f16_ : i8_;
  }

  const std::size_t hidden_;
  std::array<std::vector<std::byte>, kRows> f16_, i8_;
};

class ConstantBody final : public Body {
 public:
  explicit ConstantBody(const ClientManifest& client) {
    info_ = {.description = "constant",
             .hidden_size = static_cast<std::uint32_t>(client.hidden_size),
             .max_context = static_cast<std::uint32_t>(client.max_context),
             .kv_bytes_per_token = 1,
             .model_fingerprint = client.model_fingerprint,
             .cloak_commitment = client.cloak_commitment};
  }
  const BodyInfo& info() const override { return info_; }
  absl::StatusOr<std::unique_ptr<BodySession>> new_session() override {
    return std::make_unique<Session>();
  }
  void run(std::span<BodyStep> steps) override {
    for (BodyStep& step : steps) {
      auto& session = dynamic_cast<Session&>(*step.session);
      if (step.start_pos > session.length || !expected(step)) {
        step.status = absl::InternalError("other rows than were sent");
        continue;
      }
      session.length = step.start_pos + step.rows;
      std::fill(step.out.begin(), step.out.end(), 0.5f);
    }
  }

  // What must come; set while nothing runs. Without rows anything may.
  std::vector<std::int32_t> ids;
  std::vector<std::vector<float>> rows;

 private:
  struct Session final : BodySession {
    std::uint32_t kv_len() const override { return length; }
    std::size_t kv_bytes() const override { return 0; }
    std::uint32_t length = 0;
  };
  bool expected(const BodyStep& step) const {
    for (std::size_t i = 0; i < step.rows && !rows.empty(); ++i) {
      const auto id = static_cast<std::size_t>(ids[step.start_pos + i]);
      const auto row = step.states.subspan(i * info_.hidden_size, info_.hidden_size);
      if (!std::equal(row.begin(), row.end(), rows[id % rows.size()].begin())) return false;
    }
    return true;
  }

  BodyInfo info_;
};

// Plain TCP: takes a request of so many bytes, then answers with so many.
class Sink {
 public:
  Sink() : listener_(::socket(AF_INET, SOCK_STREAM, 0)) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof address;
    if (::bind(listener_, reinterpret_cast<sockaddr*>(&address), size) != 0 ||
        ::listen(listener_, 1) != 0 ||
        ::getsockname(listener_, reinterpret_cast<sockaddr*>(&address), &size) != 0) {
      throw std::runtime_error("no socket");
    }
    port_ = ntohs(address.sin_port);
    thread_ = std::thread([this] {
      const int fd = ::accept(listener_, nullptr, nullptr);
      std::uint64_t sizes[2];
      while (receive(fd, sizeof sizes, sizes)) {
        if (!receive(fd, sizes[0])) break;
        send(fd, sizes[1]);
      }
      ::close(fd);
    });
  }
  ~Sink() {
    thread_.join();
    ::close(listener_);
  }
  int port() const { return port_; }

  static bool receive(int fd, std::size_t size, void* into = nullptr) {
    static thread_local std::vector<char> buffer(1 << 18);
    for (std::size_t got = 0; got < size;) {
      char* to = into != nullptr ? static_cast<char*>(into) + got : buffer.data();
      const ssize_t n = ::read(fd, to, std::min(size - got, buffer.size()));
      if (n <= 0) return false;
      got += static_cast<std::size_t>(n);
    }
    return true;
  }
  static void send(int fd, std::size_t size) {
    static const std::vector<char> buffer(1 << 18, 'x');
    for (std::size_t sent = 0; sent < size;) {
      const ssize_t n =
          ::send(fd, buffer.data(), std::min(size - sent, buffer.size()), MSG_NOSIGNAL);
      if (n <= 0) return;
      sent += static_cast<std::size_t>(n);
    }
  }

 private:
  int listener_;
  int port_ = 0;
  std::thread thread_;
};

class PlainClient {
 public:
  explicit PlainClient(int port) : fd_(::socket(AF_INET, SOCK_STREAM, 0)) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<std::uint16_t>(port));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    const int on = 1;
    ::setsockopt(fd_, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (::connect(fd_, reinterpret_cast<sockaddr*>(&address), sizeof address) != 0) {
      throw std::runtime_error("no connection");
    }
  }
  ~PlainClient() { ::close(fd_); }
  double exchange(std::uint64_t up, std::uint64_t down) {
    const auto begin = Clock::now();
    const std::uint64_t sizes[2] = {up, down};
    if (::send(fd_, sizes, sizeof sizes, MSG_NOSIGNAL) != sizeof sizes)
      throw std::runtime_error("");
    Sink::send(fd_, up);
    if (!Sink::receive(fd_, down)) throw std::runtime_error("the plain line broke");
    return ms_since(begin);
  }

 private:
  int fd_;
};

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

struct Series {
  std::vector<double> first_row, cloak;  // ms
};

void measure(ClientBackend& backend, Link& link, WireDtype wire, std::vector<std::int32_t> prompt,
             Series& series) {
  Pipeline pipeline(backend, link, {.wire = wire});
  check(pipeline.open().status());
  GenerateResult result;
  check(pipeline.generate({.prompt = std::move(prompt), .max_tokens = 1}, {}, {}, result));
  const PhaseTimes& phases = result.timings[0].phases;
  series.first_row.push_back(result.ttft_ms - phases.uncloak_ms - phases.de_embed_ms -
                             phases.sample_ms);
  series.cloak.push_back(phases.embed_ms + phases.cloak_ms);
}

// What this process has held at most, in MB.
double peak_mb() {
  rusage usage{};
  ::getrusage(RUSAGE_SELF, &usage);
  return static_cast<double>(usage.ru_maxrss) * 1024 / 1e6;
}

struct Shape {
  int rounds;
  std::size_t tokens, hidden;
  double rtt_ms, mbit;
  bool cloaked;
};

int run(const Shape& shape) {
  const std::size_t tokens = shape.tokens, hidden = shape.hidden;
  const LineOptions slow{
      .one_way_delay = std::chrono::microseconds(std::lround(500 * shape.rtt_ms)),
      .bytes_per_second = shape.mbit * 1e6 / 8};
  const auto to = [&](int port) {
    LineOptions options = slow;
    options.target = port;
    return options;
  };
  TempFolder folder;
  const ClientManifest manifest = make_client(folder.path() / "client", hidden);
  TableBackend table(hidden);
  std::unique_ptr<ClientBackend> cloaking;
  if (shape.cloaked) {
    cloaking =
        value(make_cpu_client_backend(value(ClientFolder::open(folder.path() / "client")), {}));
  }
  ClientBackend& backend = shape.cloaked ? *cloaking : table;
  ConstantBody body(manifest);
  const Identity server_identity = Identity::generate(), client_identity = Identity::generate();
  const auto server = value(BodyServer::start(
      body, {.identity = &server_identity, .allow = {client_identity.public_key()}}));
  Line line(to(server->port()));
  const auto connect = [&] {
    return value(connect_link({.server = cat("127.0.0.1:", line.port()),
                               .server_key = server_identity.public_key(),
                               .identity = &client_identity,
                               .cloak_commitment = manifest.cloak_commitment,
                               .hidden_size = hidden}));
  };
  const auto warm = connect();
  Sink sink;
  Line plain_line(to(sink.port()));
  PlainClient plain(plain_line.port());

  std::mt19937 random(std::random_device{}());
  // Also what the body expects.
  const auto prompt = [&] {
    body.ids.resize(tokens);
    for (auto& id : body.ids) id = static_cast<std::int32_t>(random() % kVocab);
    return body.ids;
  };
  const auto use_wire = [&](WireDtype wire) {
    if (!shape.cloaked) body.rows = table.decoded(wire);
  };
  // Brings the cloak, the buffers and the line's windows to where they are in a batch.
  for (const WireDtype wire : {WireDtype::kF16, WireDtype::kI8}) {
    GenerateResult result;
    use_wire(wire);
    check(Pipeline(backend, *warm, {.wire = wire})
              .generate({.prompt = prompt(), .max_tokens = 1}, {}, {}, result));
  }
  std::printf("%zu tokens, hidden size %zu, RTT %.0f ms, %.0f Mbit/s; medians of %d rounds\n",
              tokens, hidden, shape.rtt_ms, shape.mbit, shape.rounds);
  std::printf("%-4s %-5s %8s %12s %12s %12s %11s %11s %11s\n", "wire", "line", "MB up",
              "computed ms", "bytes ms", "first row ms", "/ computed", "/ bytes", "/ original");
  const double peak_before = peak_mb();
  std::vector<double> original;
  for (int i = 0; i < std::max(1, shape.rounds / 3); ++i) {
    original.push_back(plain.exchange(tokens * hidden * 4, tokens * hidden * 4));
  }
  for (const WireDtype wire : {WireDtype::kF16, WireDtype::kI8}) {
    const std::size_t row = wire_row_bytes(wire, hidden);
    use_wire(wire);
    std::vector<double> alone;
    Series warm_line, fresh_line;
    for (int i = 0; i < shape.rounds; ++i) {
      alone.push_back(plain.exchange(tokens * row, row));
      measure(backend, *warm, wire, prompt(), warm_line);
      // A connection whose windows have not grown yet.
      measure(backend, *connect(), wire, prompt(), fresh_line);
    }
    const double computed =
        static_cast<double>((tokens + 1) * row) / slow.bytes_per_second * 1e3 + shape.rtt_ms;
    for (const auto& [name, series] : {std::pair{"warm", &warm_line}, {"fresh", &fresh_line}}) {
      const double first_row = median(series->first_row);
      std::printf(
          "%-4s %-5s %8.2f %12.1f %12.1f %12.1f %11.3f %11.3f %11.3f   (least %.1f; cloak "
          "%.0f ms)\n",
          std::string(wire_dtype_name(wire)).c_str(), name, static_cast<double>(tokens * row) / 1e6,
          computed, median(alone), first_row, first_row / computed, first_row / median(alone),
          first_row / median(original),
          *std::min_element(series->first_row.begin(), series->first_row.end()),
          median(series->cloak));
    }
  }
  std::printf("original's scheme, as plain TCP: %.1f ms\n", median(original));
  std::printf(
      "most memory of client, line and server together: %.0f MB (%.0f before the first round)\n",
      peak_mb(), peak_before);
  return 0;
}

}  // namespace
}  // namespace infemeral

int main(int argc, char** argv) {
  const auto number = [&](int i, double otherwise) {
    return argc > i ? std::atof(argv[i]) : otherwise;
  };
  const double rounds = number(1, 9), tokens = number(2, 1024), hidden = number(3, 4096);
  const double rtt = number(4, 20), mbit = number(5, 100);
  const std::string rows = argc > 6 ? argv[6] : "cloak";
  if (argc > 7 || rounds < 1 || tokens < 1 || tokens > 100000 || hidden < 64 || hidden > 65536 ||
      rtt < 0 || mbit <= 0 || (rows != "cloak" && rows != "table")) {
    std::fprintf(stderr,
                 "usage: prefill_line [ROUNDS [PROMPT_TOKENS [HIDDEN_SIZE [RTT_MS [MBIT_PER_S "
                 "[cloak|table]]]]]]\n");
    return 2;
  }
  try {
    return infemeral::run({.rounds = static_cast<int>(rounds),
                           .tokens = static_cast<std::size_t>(tokens),
                           .hidden = static_cast<std::size_t>(hidden),
                           .rtt_ms = rtt,
                           .mbit = mbit,
                           .cloaked = rows == "cloak"});
  } catch (const std::exception& error) {
    std::fprintf(stderr, "prefill_line: %s\n", error.what());
    return 1;
  }
}
