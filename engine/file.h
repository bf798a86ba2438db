// Small files, read and written whole, with errors that name the file.
#pragma once

#include <cstddef>
#include <filesystem>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace infemeral {

// NotFound, PermissionDenied, or InvalidArgument when the file is larger than max_bytes.
absl::StatusOr<std::string> read_text_file(const std::filesystem::path& file,
                                           std::size_t max_bytes);

// Writes beside the file and renames, so that a reader sees the old or the new text and a failed
// write leaves the old one. The error names the file and the system's reason.
absl::Status write_text_file(const std::filesystem::path& file, std::string_view text);

// An error for a failed system call on a file: "cannot open FILE: No such file or directory".
absl::Status file_error(std::string_view action, const std::filesystem::path& file, int error);

}  // namespace infemeral
