#include "tests/server_process.h"

#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <stdexcept>

#include "cpu/prepare.h"
#include "engine/text.h"

extern char** environ;

namespace infemeral {

Deployment::Deployment(const std::string& server, const TinyModelOptions& model,
                       std::size_t n_clients)
    : server_(server) {
  make_tiny_model(folder_.path() / "model", model);
  const auto prepared = prepare_model({.model_dir = folder_.path() / "model",
                                       .output_dir = folder_.path() / "out",
                                       .body_dtype = model.dtype,
                                       .threads = 1});
  if (!prepared.ok()) throw std::runtime_error(prepared.status().ToString());
  auto client = ClientFolder::open(client_folder());
  if (!client.ok()) throw std::runtime_error(client.status().ToString());
  manifest_ = client->manifest;
  if (!identity_.save(folder_.path() / "server.key").ok()) throw std::runtime_error("no key file");
  std::ofstream allow(folder_.path() / "allow");
  for (std::size_t i = 0; i < n_clients; ++i) {
    clients_.push_back(Identity::generate());
    allow << format_public_key(clients_.back().public_key()) << '\n';
  }
}

ClientLinkOptions Deployment::link_options(int port, std::size_t client) const {
  return {.server = cat("127.0.0.1:", port),
          .server_key = identity_.public_key(),
          .identity = &clients_.at(client),
          .model_fingerprint = manifest_.model_fingerprint,
          .cloak_commitment = manifest_.cloak_commitment,
          .hidden_size = manifest_.hidden_size};
}

std::vector<std::string> Deployment::command() const {
  std::vector<std::string> words;
  std::istringstream split(server_);
  for (std::string word; split >> word;) words.push_back(word);
  const std::vector<std::string> flags = {"--model",
                                          body_folder(),
                                          "--listen",
                                          "127.0.0.1:0",
                                          "--threads",
                                          "1",
                                          "--quiet",
                                          "--identity",
                                          folder_.path() / "server.key",
                                          "--allow",
                                          folder_.path() / "allow"};
  words.insert(words.end(), flags.begin(), flags.end());
  return words;
}

ServerProcess::ServerProcess(const Deployment& deployment, std::vector<std::string> flags)
    : command_(deployment.command()) {
  command_.insert(command_.end(), flags.begin(), flags.end());
  start();
}

ServerProcess::~ServerProcess() {
  end(SIGKILL);
}

void ServerProcess::start() {
  int out[2];
  if (::pipe2(out, O_CLOEXEC) != 0) throw std::runtime_error("no pipe");
  std::vector<char*> argv;
  for (std::string& word : command_) argv.push_back(word.data());
  argv.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, out[1], STDOUT_FILENO);
  const int error = posix_spawnp(&pid_, argv[0], &actions, nullptr, argv.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  ::close(out[1]);
  std::string line;
  for (char c = 0; error == 0 && ::read(out[0], &c, 1) == 1 && c != '\n';) line += c;
  ::close(out[0]);
  if (error != 0) pid_ = -1;
  const std::size_t colon = line.find(':');
  if (colon == std::string::npos) throw std::runtime_error("the server does not start");
  port_ = std::atoi(line.c_str() + colon + 1);
}

void ServerProcess::end(int signal) {
  if (pid_ <= 0) return;
  ::kill(pid_, signal);
  ::waitpid(pid_, nullptr, 0);
  pid_ = -1;
}

ProcessUsage usage_of(pid_t process) {
  const std::filesystem::path proc = cat("/proc/", process);
  ProcessUsage usage;
  std::ifstream status(proc / "status");
  for (std::string line; std::getline(status, line);) {
    std::istringstream words(line);
    std::string name;
    double value = 0;
    words >> name >> value;
    if (name == "VmRSS:") usage.rss_kib = value;
    if (name == "RssAnon:") usage.anonymous_kib = value;
    if (name == "Threads:") usage.threads = static_cast<int>(value);
  }
  if (usage.threads == 0) throw std::runtime_error("the server has ended");
  for (const auto& entry : std::filesystem::directory_iterator(proc / "fd")) {
    (void)entry;
    ++usage.descriptors;
  }
  return usage;
}

void raise_descriptor_limit() {
  rlimit limit{};
  if (::getrlimit(RLIMIT_NOFILE, &limit) != 0) throw std::runtime_error("no descriptor limit");
  limit.rlim_cur = limit.rlim_max;
  if (::setrlimit(RLIMIT_NOFILE, &limit) != 0) throw std::runtime_error("no descriptor limit");
}

double growth(const std::vector<double>& values) {
  std::vector<double> slopes;
  for (std::size_t i = 0; i < values.size(); ++i) {
    for (std::size_t j = i + 1; j < values.size(); ++j) {
      slopes.push_back((values[j] - values[i]) / static_cast<double>(j - i));
    }
  }
  if (slopes.empty()) return 0;
  const auto middle = slopes.begin() + static_cast<std::ptrdiff_t>(slopes.size() / 2);
  std::nth_element(slopes.begin(), middle, slopes.end());
  return *middle * static_cast<double>(values.size() - 1);
}

}  // namespace infemeral
