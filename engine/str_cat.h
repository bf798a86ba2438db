// absl::StrCat that takes std::string_view too: Debian's Abseil keeps its own string_view type.
#pragma once

#include <string>
#include <string_view>
#include <type_traits>

#include "absl/strings/str_cat.h"

namespace infemeral {

namespace internal {
template <typename T>
decltype(auto) str_cat_piece(const T& value) {
  if constexpr (std::is_same_v<T, std::string_view>) {
    return absl::string_view(value.data(), value.size());
  } else {
    return (value);
  }
}
}  // namespace internal

template <typename... Pieces>
std::string str_cat(const Pieces&... pieces) {
  return absl::StrCat(internal::str_cat_piece(pieces)...);
}

}  // namespace infemeral
