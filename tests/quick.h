#pragma once
#include <cstdlib>

namespace q4s {

// Environment Q4S_QUICK: 1, fewer and smaller cases; 2, as few as meet every path, for sanitizers that take
// seconds for a kernel that waits for others.
inline int quick() {
  const char* value = std::getenv("Q4S_QUICK");
  return value ? std::atoi(value) : 0;
}

}  // namespace q4s
