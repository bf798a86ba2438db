// Large arrays that are read for every token lie on huge pages, where the system gives them.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>

namespace infemeral {

inline constexpr std::uintptr_t kHugePage = std::uintptr_t{2} << 20;

// Moves what is written already, as far as it fills whole huge pages; the contents stay. Where the
// system cannot, nothing happens. Tens of milliseconds for tens of megabytes.
inline void move_to_huge_pages([[maybe_unused]] const void* data,
                               [[maybe_unused]] std::size_t bytes) {
#ifdef MADV_COLLAPSE
  const auto address = reinterpret_cast<std::uintptr_t>(data);
  const std::uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage;
  const std::uintptr_t end = (address + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_COLLAPSE);
#endif
}

}  // namespace infemeral
