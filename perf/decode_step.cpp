// One decode step over the loopback interface, encoded, encrypted, streamed, decrypted and decoded
// both ways, against bare gRPC streams that echo as many bytes. The body gives back the row that it
// is given. Servers run in a process of their own, as in use; the measurements take turns.
//
// usage: decode_step [ROUNDS [HIDDEN_SIZE [f32|f16|i8 [processes]]]], one process or two
#include <grpcpp/grpcpp.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <stdexcept>
#include <thread>

#include "engine/text.h"
#include "net/body_server.h"
#include "net/client_link.h"
#include "perf/bench_bodies.h"
#include "proto/split_inference.grpc.pb.h"

namespace infemeral {
namespace {

using Clock = std::chrono::steady_clock;
using v1::Envelope;

constexpr int kStepsPerRound = 500;  // of each contender

// What the bare servers say back: the client's message, through the callback API that BodyServer
// uses, or with a thread for each stream.
class CallbackEcho final : public v1::SplitInference::CallbackService {
  class Reactor final : public grpc::ServerBidiReactor<Envelope, Envelope> {
   public:
    Reactor() { StartRead(&message_); }
    void OnReadDone(bool ok) override {
      if (!ok) return Finish(grpc::Status::OK);
      StartWrite(&message_);
    }
    void OnWriteDone(bool ok) override {
      if (ok) StartRead(&message_);
    }
    void OnDone() override { delete this; }

   private:
    Envelope message_;
  };
  grpc::ServerBidiReactor<Envelope, Envelope>* Session(grpc::CallbackServerContext*) override {
    return new Reactor;
  }
};

class ThreadEcho final : public v1::SplitInference::Service {
  grpc::Status Session(grpc::ServerContext*,
                       grpc::ServerReaderWriter<Envelope, Envelope>* stream) override {
    Envelope message;
    while (stream->Read(&message) && stream->Write(message)) {
    }
    return grpc::Status::OK;
  }
};

class EchoServer {
 public:
  explicit EchoServer(grpc::Service* service) {
    grpc::ServerBuilder builder;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port_);
    builder.RegisterService(service);
    server_ = builder.BuildAndStart();
    if (!server_) throw std::runtime_error("the bare server does not start");
  }
  int port() const { return port_; }

 private:
  int port_ = 0;
  std::unique_ptr<grpc::Server> server_;
};

class EchoClient {
 public:
  explicit EchoClient(int port)
      : stub_(v1::SplitInference::NewStub(
            grpc::CreateChannel(cat("127.0.0.1:", port), grpc::InsecureChannelCredentials()))),
        stream_(stub_->Session(&context_)) {}
  ~EchoClient() {
    context_.TryCancel();
    (void)stream_->Finish();
  }
  void exchange(const Envelope& sent, Envelope& received) {
    if (!stream_->Write(sent) || !stream_->Read(&received)) {
      throw std::runtime_error("a bare stream broke");
    }
  }

 private:
  std::unique_ptr<v1::SplitInference::Stub> stub_;
  grpc::ClientContext context_;
  std::unique_ptr<grpc::ClientReaderWriter<Envelope, Envelope>> stream_;
};

struct Ports {
  int body = 0, callback = 0, thread = 0;
};

// The servers, in a child process that ends when the pipe to it is closed, or in this one.
class Servers {
 public:
  Servers(bool own_process, std::size_t hidden_size, const Identity& identity,
          const PublicKey& client) {
    std::array<int, 2> up{}, down{};
    if (::pipe(up.data()) != 0 || ::pipe(down.data()) != 0) throw std::runtime_error("no pipe");
    if (own_process) child_ = ::fork();  // before gRPC has made any thread
    if (own_process && child_ < 0) throw std::runtime_error("no process for the servers");
    if (child_ == 0) {
      ::close(up[0]);
      ::close(down[1]);
      serve(hidden_size, identity, client, up[1], down[0]);
      std::_Exit(0);
    }
    if (own_process) {
      ::close(up[1]);
      ::close(down[0]);
    } else {
      thread_ =
          std::thread([=, &identity] { serve(hidden_size, identity, client, up[1], down[0]); });
    }
    end_ = down[1];
    const bool told = ::read(up[0], &ports_, sizeof ports_) == sizeof ports_;
    ::close(up[0]);
    if (!told) throw std::runtime_error("the servers do not start");
  }
  ~Servers() {
    ::close(end_);
    if (thread_.joinable()) {
      thread_.join();
    } else {
      ::waitpid(child_, nullptr, 0);
    }
  }
  Servers(const Servers&) = delete;
  Servers& operator=(const Servers&) = delete;
  const Ports& ports() const { return ports_; }

 private:
  static void serve(std::size_t hidden_size, const Identity& identity, const PublicKey& client,
                    int up, int down) {
    EchoBody body(hidden_size);
    auto server = BodyServer::start(body, {.identity = &identity, .allow = {client}});
    CallbackEcho callback;
    ThreadEcho thread;
    const EchoServer callback_server(&callback), thread_server(&thread);
    if (server.ok()) {
      const Ports ports{(*server)->port(), callback_server.port(), thread_server.port()};
      char unused = 0;
      if (::write(up, &ports, sizeof ports) == sizeof ports) (void)!::read(down, &unused, 1);
    }
    ::close(up);
    ::close(down);
  }

  pid_t child_ = -1;
  std::thread thread_;
  int end_ = -1;
  Ports ports_;
};

struct Contender {
  const char* name;
  std::function<void()> step;
  std::vector<double> us;
};

double quantile(const std::vector<double>& sorted, double part) {
  return sorted[static_cast<std::size_t>(part * static_cast<double>(sorted.size() - 1))];
}

std::string random_bytes(std::size_t size, std::mt19937_64& random) {
  std::string bytes(size, '\0');
  for (char& byte : bytes) byte = static_cast<char>(random());
  return bytes;
}

int run(int rounds, std::size_t hidden, WireDtype dtype, bool own_process) {
  std::mt19937_64 random(std::random_device{}());
  const Identity server_identity = Identity::generate(), client = Identity::generate();
  const Servers servers(own_process, hidden, server_identity, client.public_key());
  auto link = connect_link({.server = cat("127.0.0.1:", servers.ports().body),
                            .server_key = server_identity.public_key(),
                            .identity = &client,
                            .hidden_size = hidden});
  if (!link.ok()) throw std::runtime_error(link.status().ToString());
  const auto session = (*link)->open_session({});
  if (!session.ok()) throw std::runtime_error(session.status().ToString());

  PhaseTimes phases;
  StepReply reply;
  std::vector<std::byte> row = random_row(dtype, hidden, random);
  std::uint32_t position = 0;
  const auto step = [&] {
    position = (position + 1) % session->max_context;
    const auto status = (*link)->step({.session = session->id,
                                       .start_pos = position,
                                       .rows = 1,
                                       .dtype = dtype,
                                       .tensor = row,
                                       .wanted = Wanted::kLast},
                                      {}, reply, phases);
    if (!status.ok()) throw std::runtime_error(status.ToString());
  };
  // The bytes first, with fresh ones each time. An int8 row is quantised anew on its way back.
  for (int i = 0; i < 200; ++i) {
    row = random_row(dtype, hidden, random);
    step();
    if (dtype != WireDtype::kI8 && reply.tensor != row) {
      throw std::runtime_error("the link does not give back the row that it was given");
    }
  }
  const LinkCounters before = (*link)->counters();
  step();
  const LinkCounters after = (*link)->counters();
  EchoClient callback(servers.ports().callback), thread(servers.ports().thread);
  Envelope up, down;
  up.set_data(random_bytes(1, random));
  const std::size_t envelope_bytes = after.bytes_up - before.bytes_up;
  while (up.ByteSizeLong() < envelope_bytes) {
    up.set_data(random_bytes(up.data().size() + envelope_bytes - up.ByteSizeLong(), random));
  }
  for (EchoClient* echo : {&callback, &thread}) {
    for (int i = 0; i < 200; ++i) {
      up.set_data(random_bytes(up.data().size(), random));
      echo->exchange(up, down);
      if (down.data() != up.data()) throw std::runtime_error("a bare stream changes its bytes");
    }
  }

  std::array<Contender, 3> contenders = {
      {{"link", step, {}},
       {"bare, callback server", [&] { callback.exchange(up, down); }, {}},
       {"bare, thread server", [&] { thread.exchange(up, down); }, {}}}};
  phases = {};
  for (int i = 0; i < rounds; ++i) {
    for (Contender& contender : contenders) {
      for (int j = 0; j < kStepsPerRound; ++j) {
        const auto begin = Clock::now();
        contender.step();
        contender.us.push_back(
            std::chrono::duration<double, std::micro>(Clock::now() - begin).count());
      }
    }
  }

  std::printf("hidden size %zu, %s: %zu bytes up, %llu down; %d x %d steps each\n", hidden,
              std::string(wire_dtype_name(dtype)).c_str(), up.ByteSizeLong(),
              static_cast<unsigned long long>(after.bytes_down - before.bytes_down), rounds,
              kStepsPerRound);
  std::printf("%-24s %8s %8s %8s %8s   us\n", "", "least", "p10", "p50", "p90");
  for (Contender& contender : contenders) {
    std::sort(contender.us.begin(), contender.us.end());
    std::printf("%-24s %8.1f %8.1f %8.1f %8.1f\n", contender.name, contender.us.front(),
                quantile(contender.us, 0.1), quantile(contender.us, 0.5),
                quantile(contender.us, 0.9));
  }
  const double steps = static_cast<double>(contenders[0].us.size());
  std::printf(
      "phases of the link, means: encode %.1f, encrypt %.1f, network %.1f, body %.1f, "
      "decrypt %.1f, decode %.1f us\n",
      phases.encode_ms * 1e3 / steps, phases.encrypt_ms * 1e3 / steps,
      phases.network_ms * 1e3 / steps, phases.body_ms * 1e3 / steps,
      phases.decrypt_ms * 1e3 / steps, phases.decode_ms * 1e3 / steps);
  for (const double part : {0.1, 0.5}) {
    const double fastest =
        std::min(quantile(contenders[1].us, part), quantile(contenders[2].us, part));
    std::printf("link / the faster bare stream, p%.0f: %.3f\n", part * 100,
                quantile(contenders[0].us, part) / fastest);
  }
  return 0;
}

}  // namespace
}  // namespace infemeral

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 20;
  const int hidden = argc > 2 ? std::atoi(argv[2]) : 4096;
  const auto dtype = infemeral::parse_wire_dtype(argc > 3 ? argv[3] : "f16");
  const int processes = argc > 4 ? std::atoi(argv[4]) : 2;
  if (argc > 5 || processes < 1 || processes > 2 || rounds < 1 || hidden < 64 || hidden > 65536 ||
      !dtype) {
    std::fprintf(stderr, "usage: decode_step [ROUNDS [HIDDEN_SIZE [f32|f16|i8 [1|2]]]]\n");
    return 2;
  }
  try {
    return infemeral::run(rounds, static_cast<std::size_t>(hidden), *dtype, processes == 2);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "decode_step: %s\n", error.what());
    return 1;
  }
}
