// Places buffers with known lifetimes in one arena so that no two that are alive together overlap.
#pragma once
#include <cstddef>
#include <vector>

namespace q4s {

constexpr size_t kArenaAlign = 256;

struct Lifetime {
  size_t bytes;
  int first, last;    // steps, inclusive
  size_t offset = 0;  // set by plan_arena
};

// Largest first, each at the lowest offset that is free over its whole life. Returns the arena's size in
// bytes.
size_t plan_arena(std::vector<Lifetime>&);

}  // namespace q4s
