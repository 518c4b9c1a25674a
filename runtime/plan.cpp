#include "runtime/plan.h"

#include <algorithm>
#include <numeric>

namespace q4s {

size_t plan_arena(std::vector<Lifetime>& items) {
  std::vector<int> order(items.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return items[a].bytes > items[b].bytes; });

  std::vector<int> placed;  // in order of offset
  size_t total = 0;
  for (const int i : order) {
    Lifetime& item = items[i];
    const size_t bytes = (item.bytes + kArenaAlign - 1) / kArenaAlign * kArenaAlign;
    size_t at = 0;
    for (const int j : placed) {
      const Lifetime& other = items[j];
      if (other.last < item.first || item.last < other.first) continue;
      if (at + bytes <= other.offset) break;
      at = std::max(at, other.offset + (other.bytes + kArenaAlign - 1) / kArenaAlign * kArenaAlign);
    }
    item.offset = at;
    total = std::max(total, at + bytes);
    placed.insert(std::upper_bound(placed.begin(), placed.end(), i,
                                   [&](int a, int b) { return items[a].offset < items[b].offset; }),
                  i);
  }
  return total;
}

}  // namespace q4s
