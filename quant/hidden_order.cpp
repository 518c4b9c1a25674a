#include "quant/hidden_order.h"

#include <algorithm>
#include <numeric>

namespace q4s {

std::vector<int32_t> hidden_order(WeightWork& work, const float* down, int64_t n, int64_t k) {
  const std::vector<double> size = work.column_squares(down, n, k);
  std::vector<int32_t> order(k);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return size[a] > size[b]; });
  return order;
}

void order_hidden(WeightWork& work, const LlamaConfig& c, Unit u, float* w,
                  const std::vector<int32_t>& order) {
  if (u == Unit::kDown) work.take_columns(w, c.dim, order);
  if (u != Unit::kGateUp) return;
  work.take_rows(w, c.dim, order);
  work.take_rows(w + c.hidden * c.dim, c.dim, order);
}

}  // namespace q4s
