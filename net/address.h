// Addresses as users write them.
#pragma once

#include <string_view>

namespace infemeral {

// Whether "host:port" stays on this machine.
inline bool is_loopback(std::string_view address) {
  return address.starts_with("localhost:") || address.starts_with("127.") ||
         address.starts_with("[::1]:") || address.starts_with("unix:");
}

}  // namespace infemeral
