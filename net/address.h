// Addresses as users write them.
#pragma once

#include <charconv>
#include <string_view>
#include <system_error>

namespace infemeral {

// Whether "host:port" stays on this machine.
inline bool is_loopback(std::string_view address) {
  return address.starts_with("localhost:") || address.starts_with("127.") ||
         address.starts_with("[::1]:") || address.starts_with("unix:");
}

// Whether it is a number that a port can have; 0 is one for a listener alone.
inline bool is_port(std::string_view text) {
  unsigned port = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), port);
  return error == std::errc() && end == text.data() + text.size() && port <= 65535;
}

}  // namespace infemeral
