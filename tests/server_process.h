// Real server processes of a small random model, for programs that kill them and watch their size.
#pragma once

#include <sys/types.h>

#include <string>
#include <vector>

#include "engine/client_folder.h"
#include "net/client_link.h"
#include "net/identity.h"
#include "tests/tiny_model.h"

namespace infemeral {

// A prepared model, its folders and keys. Functions throw std::runtime_error when something does
// not work.
class Deployment {
 public:
  // `server` is a command, split at spaces: engine_serve, or a program that takes its flags.
  Deployment(const std::string& server, const TinyModelOptions& model, std::size_t n_clients = 1);

  std::filesystem::path client_folder() const { return folder_.path() / "out" / "client"; }
  std::filesystem::path body_folder() const { return folder_.path() / "out" / "body"; }
  const ClientManifest& manifest() const { return manifest_; }
  std::size_t n_clients() const { return clients_.size(); }
  ClientLinkOptions link_options(int port, std::size_t client = 0) const;
  // What starts a server on a free port of the loopback interface.
  std::vector<std::string> command() const;

 private:
  const std::string server_;
  TempFolder folder_;
  ClientManifest manifest_;
  const Identity identity_ = Identity::generate();
  std::vector<Identity> clients_;
};

class ServerProcess {
 public:
  // `flags` are the server's, beyond those of Deployment::command().
  explicit ServerProcess(const Deployment& deployment, std::vector<std::string> flags = {});
  ~ServerProcess();  // kills it
  ServerProcess(const ServerProcess&) = delete;
  ServerProcess& operator=(const ServerProcess&) = delete;

  void start();  // on another port; returns when it listens
  void end(int signal);
  int port() const { return port_; }
  pid_t pid() const { return pid_; }

 private:
  std::vector<std::string> command_;
  pid_t pid_ = -1;
  int port_ = 0;
};

// What a process holds, from /proc.
struct ProcessUsage {
  double rss_kib = 0;        // resident memory
  double anonymous_kib = 0;  // of it, heap and stacks: without the program's own files
  int descriptors = 0;
  int threads = 0;
};
ProcessUsage usage_of(pid_t process);

// As many descriptors as this process may have; servers that it starts inherit them.
void raise_descriptor_limit();

// Growth from the first to the last of `values`, which were taken at equal distances, along the
// line whose slope is the median of those between all pairs: single high samples do not matter.
double growth(const std::vector<double>& values);

}  // namespace infemeral
