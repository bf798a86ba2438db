// Reading JSON that others wrote: bounded size and depth, and errors that name the file.
#pragma once

#include <cstddef>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace infemeral {

inline constexpr std::size_t kMaxJsonDepth = 64;  // some JSON calls recurse once a level

// The parsed text. Errors begin with `name`: InvalidArgument when it is not JSON or nests deeper
// than kMaxJsonDepth, ResourceExhausted when there is no memory for it.
absl::StatusOr<nlohmann::json> parse_json(std::string_view text, std::string_view name);

// A whole file. NotFound, PermissionDenied or DataLoss when it cannot be read, ResourceExhausted
// when it is larger than max_bytes.
absl::StatusOr<std::string> read_text_file(const std::filesystem::path& file,
                                           std::size_t max_bytes);

// Creates `file` (never overwrites) with `mode` and writes it through to the disk.
absl::Status write_new_file(const std::filesystem::path& file, std::string_view bytes,
                            unsigned mode);

// Replaces `file` as a whole: it is written beside it and renamed, so that a reader sees the old or
// the new text and a failed write leaves the old one. A symbolic link is followed; a pipe or a
// device is written to as it is.
absl::Status replace_file(const std::filesystem::path& file, std::string_view bytes);

// "what FILE: the system's words" under the code that fits errno.
absl::Status errno_status(int error, std::string_view what, const std::filesystem::path& file);

}  // namespace infemeral
