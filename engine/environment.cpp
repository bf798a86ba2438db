#include "engine/environment.h"

#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <thread>

#include "engine/text.h"

namespace infemeral {
namespace {

// The value of the first line that begins with `key`, behind its colon.
std::string proc_value(const std::filesystem::path& file, std::string_view key) {
  std::ifstream stream(file);
  for (std::string line; std::getline(stream, line);) {
    if (!line.starts_with(key)) continue;
    const auto colon = line.find(':');
    if (colon == std::string::npos) continue;
    const auto begin = line.find_first_not_of(" \t", colon + 1);
    if (begin != std::string::npos) return line.substr(begin);
  }
  return {};
}

// The first word that looks like a version in "NVRM version: NVIDIA UNIX x86_64 Kernel Module
// 550.54.15  Tue ...".
std::string driver_version() {
  std::istringstream words(proc_value("/proc/driver/nvidia/version", "NVRM version"));
  for (std::string word; words >> word;) {
    const bool version = word.find('.') != std::string::npos &&
                         word.find_first_not_of("0123456789.") == std::string::npos;
    if (version) return word;
  }
  return {};
}

std::vector<std::string> gpu_names() {
  std::vector<std::string> names;
  std::error_code error;
  std::filesystem::directory_iterator entry("/proc/driver/nvidia/gpus", error);
  for (; !error && entry != std::filesystem::directory_iterator(); entry.increment(error)) {
    std::string name = proc_value(entry->path() / "information", "Model");
    if (!name.empty()) names.push_back(std::move(name));
  }
  std::sort(names.begin(), names.end());
  return names;
}

}  // namespace

Environment read_environment() {
  Environment result;
  result.cpu = proc_value("/proc/cpuinfo", "model name");
  if (result.cpu.empty()) result.cpu = "unknown";
  result.logical_cores = static_cast<int>(std::thread::hardware_concurrency());
  const long pages = ::sysconf(_SC_PHYS_PAGES), page = ::sysconf(_SC_PAGESIZE);
  if (pages > 0 && page > 0) {
    result.memory_bytes = static_cast<std::size_t>(pages) * static_cast<std::size_t>(page);
  }
  utsname system{};
  if (::uname(&system) == 0) {
    result.os = cat(system.sysname, " ", system.release);
    result.machine = system.machine;
  }
  result.gpu_driver = driver_version();
  result.gpus = gpu_names();
  return result;
}

std::string utc_now() {
  const std::time_t now = std::time(nullptr);
  std::tm utc{};
  gmtime_r(&now, &utc);
  char text[32];
  std::strftime(text, sizeof(text), "%Y-%m-%dT%H:%M:%SZ", &utc);
  return text;
}

}  // namespace infemeral
