#include "engine/fingerprint.h"

#include <algorithm>

#include "absl/strings/escaping.h"
#include "engine/text.h"

namespace infemeral {

std::string fingerprint_text(const Fingerprint& fingerprint) {
  return absl::BytesToHexString(
      {reinterpret_cast<const char*>(fingerprint.data()), fingerprint.size()});
}

std::optional<Fingerprint> parse_fingerprint(std::string_view text) {
  Fingerprint result;
  if (text.size() != 2 * result.size() ||
      text.find_first_not_of("0123456789abcdef") != std::string_view::npos) {
    return std::nullopt;
  }
  const std::string bytes = absl::HexStringToBytes(to_absl(text));
  std::copy(bytes.begin(), bytes.end(), result.begin());
  return result;
}

}  // namespace infemeral
