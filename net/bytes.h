// Text as the bytes that it is.
#pragma once

#include <cstddef>
#include <span>
#include <string_view>

namespace infemeral {

// Valid as long as the text.
inline std::span<const std::byte> bytes_of(std::string_view text) {
  return std::as_bytes(std::span<const char>(text));
}

}  // namespace infemeral
