// Large arrays in pages of 2 MB where the kernel grants them: a core that streams through small pages waits
// for their translations. A mapped file's pages are the kernel's choice (mapped_file.h).
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <new>
#include <vector>

namespace q4s {

constexpr size_t kHugePage = size_t(2) << 20;

// An allocator for containers; what is smaller than a huge page is allocated as always.
template <typename T>
struct HugePages {
  using value_type = T;
  HugePages() = default;
  template <typename U>
  HugePages(const HugePages<U>&) {}

  T* allocate(size_t n) {
    const size_t bytes = n * sizeof(T);
    if (bytes < kHugePage) return static_cast<T*>(::operator new(bytes));
    const size_t whole = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    void* p = ::operator new (whole, std::align_val_t{kHugePage});
    (void)madvise(p, whole, MADV_HUGEPAGE);  // a hint: a refusal changes nothing
    return static_cast<T*>(p);
  }
  void deallocate(T* p, size_t n) {
    if (n * sizeof(T) < kHugePage)
      ::operator delete(p);
    else
      ::operator delete (p, std::align_val_t{kHugePage});
  }
  friend bool operator==(const HugePages&, const HugePages&) { return true; }
};

template <typename T>
using HugeVector = std::vector<T, HugePages<T>>;

}  // namespace q4s
