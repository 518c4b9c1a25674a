#include "runtime/plan.h"

#include <doctest/doctest.h>

#include <random>

using namespace q4s;

TEST_CASE("live intervals never overlap, over random lifetimes") {
  std::mt19937 rng(7);
  for (int round = 0; round < 300; ++round) {
    std::vector<Lifetime> items(1 + rng() % 40);
    size_t sum = 0;
    for (Lifetime& l : items) {
      l.bytes = rng() % 5000;
      l.first = int(rng() % 30);
      l.last = l.first + int(rng() % 10);
      sum += (l.bytes + kArenaAlign - 1) / kArenaAlign * kArenaAlign;
    }
    const size_t total = plan_arena(items);
    CHECK(total <= sum);
    for (size_t i = 0; i < items.size(); ++i) {
      CHECK(items[i].offset % kArenaAlign == 0);
      CHECK(items[i].offset + items[i].bytes <= total);
      for (size_t j = 0; j < i; ++j) {
        const Lifetime &a = items[i], &b = items[j];
        const bool together = a.first <= b.last && b.first <= a.last;
        const bool apart = a.offset + a.bytes <= b.offset || b.offset + b.bytes <= a.offset;
        CHECK((!together || apart || a.bytes == 0 || b.bytes == 0));
      }
    }
  }
}

TEST_CASE("a chain needs the two buffers that are alive together") {
  std::vector<Lifetime> chain;
  for (int i = 0; i < 10; ++i) chain.push_back({1024, i, i + 1});
  CHECK(plan_arena(chain) == 2048);
}
