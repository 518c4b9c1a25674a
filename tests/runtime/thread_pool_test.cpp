#include "runtime/thread_pool.h"

#include <doctest/doctest.h>

#include "runtime/error.h"

using namespace q4s;

TEST_CASE("every part runs once, and barriers separate phases") {
  for (const int threads : {1, 2, 3, 8}) {
    ThreadPool pool(threads);
    REQUIRE(pool.threads() == threads);
    for (int round = 0; round < 50; ++round) {
      std::vector<int> first(size_t(threads), 0), sum(size_t(threads), 0);
      pool.run([&](Part p) {
        REQUIRE(p.count == threads);
        first[size_t(p.index)] += 1 + p.index;
        pool.barrier();
        for (const int v : first) sum[size_t(p.index)] += v;
      });
      for (const int s : sum) CHECK(s == threads * (threads + 1) / 2);
    }
  }
}

TEST_CASE("parallel_for covers the range once") {
  ThreadPool pool(4);
  std::vector<std::atomic<int>> hits(1003);
  pool.parallel_for(1003, 10, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) ++hits[size_t(i)];
  });
  for (const auto& h : hits) CHECK(h == 1);
}

TEST_CASE("an exception of any thread reaches the caller and the pool goes on") {
  ThreadPool pool(3);
  for (int thrower = 0; thrower < 3; ++thrower)
    CHECK_THROWS_AS(pool.run([&](Part p) {
      if (p.index == thrower) throw Error(ErrorKind::kRuntime, "x");
    }),
                    Error);
  std::atomic<int> ran{0};
  pool.run([&](Part) { ++ran; });
  CHECK(ran == 3);
}

TEST_CASE("thread counts out of range are refused") { CHECK_THROWS_AS(ThreadPool(1 << 20), Error); }
