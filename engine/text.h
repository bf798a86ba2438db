// Text for messages. Debian builds Abseil with a string_view of its own, which does not take
// std::string_view; cat() is absl::StrCat for both.
#pragma once

#include <string>
#include <string_view>
#include <type_traits>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"

namespace infemeral {

inline absl::string_view to_absl(std::string_view text) {
  return {text.data(), text.size()};
}

template <typename... T>
std::string cat(const T&... parts) {
  const auto adapt = [](const auto& part) -> decltype(auto) {
    if constexpr (std::is_same_v<std::decay_t<decltype(part)>, std::string_view>) {
      return to_absl(part);
    } else {
      return (part);
    }
  };
  std::string result;
  (absl::StrAppend(&result, adapt(parts)), ...);
  return result;
}

// A name that came from a file or a peer, in quotes, shortened and safe to print on one line.
inline std::string quote_name(std::string_view name) {
  constexpr std::size_t kShown = 120;
  return cat("'", absl::CHexEscape(to_absl(name.substr(0, kShown))),
             name.size() > kShown ? "..." : "", "'");
}

}  // namespace infemeral
