// What was built. The values come from the build (cmake/version.cpp.in, cmake/revision.cmake).
#pragma once

namespace infemeral {

extern const char kVersion[];  // "0.1.0"
extern const char
    kGitRevision[];  // short commit hash, "-dirty" when the tree had changes; or "unknown"
extern const char kBuildType[];   // "Release"
extern const char kSanitizers[];  // "address,undefined"; empty without
extern const char kCompiler[];    // "GNU 12.2.0"

}  // namespace infemeral
