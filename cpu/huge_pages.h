// Large arrays that are read for every token lie on huge pages, where the system gives them: from
// pages of 4 KB a product takes half as long again in a virtual machine.
#pragma once

#include <sodium.h>
#include <sys/mman.h>

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>

namespace infemeral {

// Values that nobody has written yet.
template <typename T>
class HugeArray {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  explicit HugeArray(std::size_t size) : size_(size), values_(allocate(size)) {}

  T* data() { return values_.get(); }
  const T* data() const { return values_.get(); }
  std::size_t bytes() const { return size_ * sizeof(T); }

  // Overwrites them, for values that are secret. Also of one that was moved from, which has none.
  void wipe() {
    if (values_ != nullptr) sodium_memzero(data(), bytes());
  }

 private:
  static constexpr std::size_t kPage = std::size_t{2} << 20;

  struct Free {
    void operator()(T* values) const { std::free(values); }
  };
  static T* allocate(std::size_t size) {
    if (size > static_cast<std::size_t>(-1) / sizeof(T) - kPage) throw std::bad_array_new_length();
    const std::size_t bytes = (size * sizeof(T) + kPage - 1) / kPage * kPage;
    void* values = std::aligned_alloc(kPage, bytes);
    if (values == nullptr) throw std::bad_alloc();
    // Less than a page would only be cleared in vain. A refusal makes it slower, nothing else.
    if (size * sizeof(T) >= kPage) madvise(values, bytes, MADV_HUGEPAGE);
    return static_cast<T*>(values);
  }

  std::size_t size_;
  std::unique_ptr<T[], Free> values_;
};

}  // namespace infemeral
