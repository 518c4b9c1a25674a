// Test buffers whose end touches an unreadable page (an access past it faults) and whose front is a canary
// that is checked when the buffer goes; and the seeded values to fill them with.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <random>
#include <span>

#include "doctest/doctest.h"

namespace q4s {

template <typename T>
class Guarded {
 public:
  explicit Guarded(int64_t n, T fill = T{}) : n_(n) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE)), bytes = size_t(n) * sizeof(T);
    size_ = (bytes + kCanary + page - 1) / page * page;
    base_ = static_cast<unsigned char*>(
        mmap(nullptr, size_ + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    REQUIRE(base_ != MAP_FAILED);
    mprotect(base_ + size_, page, PROT_NONE);
    mapped_ = size_ + page;
    data_ = reinterpret_cast<T*>(base_ + size_ - bytes);
    std::memset(base_, 0xa5, size_ - bytes);
    std::fill(data_, data_ + n, fill);
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() {
    bool intact = true;
    for (const unsigned char* p = base_; p < reinterpret_cast<unsigned char*>(data_); ++p)
      intact &= *p == 0xa5;
    CHECK_MESSAGE(intact, "bytes before a buffer were overwritten");
    munmap(base_, mapped_);
  }
  T* data() { return data_; }
  const T* data() const { return data_; }
  int64_t size() const { return n_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }
  T* begin() { return data_; }
  T* end() { return data_ + n_; }
  std::span<T> span() { return {data_, size_t(n_)}; }
  bool same_bits(const Guarded& o) const {
    return n_ == o.n_ && !std::memcmp(data_, o.data_, size_t(n_) * sizeof(T));
  }

 private:
  static constexpr size_t kCanary = 64;
  int64_t n_;
  size_t size_, mapped_;
  unsigned char* base_;
  T* data_;
};

inline void fill_normal(std::span<float> v, uint64_t seed, float sd = 1) {
  std::mt19937_64 rng(seed);
  std::normal_distribution<float> normal(0, sd);
  for (float& x : v) x = normal(rng);
}

inline void fill_bytes(std::span<uint8_t> v, uint64_t seed) {
  std::mt19937_64 rng(seed);
  for (uint8_t& x : v) x = uint8_t(rng());
}

}  // namespace q4s
