// What this room was linked with, for reports.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace infemeral {

// Name and version of each library that a token's way over the network depends on.
std::vector<std::pair<std::string, std::string>> library_versions();

}  // namespace infemeral
