// Buffers that begin where a cache line does.
#pragma once

#include <cstddef>
#include <new>
#include <vector>

namespace infemeral {

// The largest vectors are as wide as a cache line: one that begins elsewhere crosses two lines with
// every load, which costs a product of several rows a tenth of its time.
template <typename T>
struct CacheAligned {
  using value_type = T;
  static constexpr std::align_val_t kLine{64};

  CacheAligned() = default;
  template <typename U>
  CacheAligned(const CacheAligned<U>&) {}
  T* allocate(std::size_t n) {
    if (n > static_cast<std::size_t>(-1) / sizeof(T)) throw std::bad_array_new_length();
    return static_cast<T*>(::operator new(n * sizeof(T), kLine));
  }
  void deallocate(T* p, std::size_t) { ::operator delete(p, kLine); }
  bool operator==(const CacheAligned&) const { return true; }
};

template <typename T>
using AlignedVector = std::vector<T, CacheAligned<T>>;
using AlignedFloats = AlignedVector<float>;

}  // namespace infemeral
