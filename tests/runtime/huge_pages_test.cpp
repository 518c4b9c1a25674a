#include "runtime/huge_pages.h"

#include <doctest/doctest.h>

#include <cstdint>
#include <numeric>

using namespace q4s;

TEST_CASE(
    "huge pages: large arrays start on one, small ones are as always, contents survive growth and moves") {
  for (const size_t n : {size_t(0), size_t(1), kHugePage / 4 - 1, kHugePage / 4, 3 * kHugePage / 4 + 5}) {
    HugeVector<uint32_t> v(n);
    if (n * 4 >= kHugePage) CHECK(reinterpret_cast<uintptr_t>(v.data()) % kHugePage == 0);
    std::iota(v.begin(), v.end(), 7u);
    v.resize(n + kHugePage / 4);
    CHECK(reinterpret_cast<uintptr_t>(v.data()) % kHugePage == 0);
    const HugeVector<uint32_t> moved = std::move(v);
    bool same = moved.size() == n + kHugePage / 4;
    for (size_t i = 0; i < moved.size(); ++i) same = same && moved[i] == (i < n ? uint32_t(7 + i) : 0u);
    CHECK(same);
  }
}
