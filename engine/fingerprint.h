// Fingerprints as text: 64 lowercase hexadecimal digits, as manifests hold them.
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "engine/link.h"

namespace infemeral {

std::string fingerprint_text(const Fingerprint& fingerprint);
std::optional<Fingerprint> parse_fingerprint(std::string_view text);

}  // namespace infemeral
