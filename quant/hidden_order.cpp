#include "quant/hidden_order.h"

#include <algorithm>
#include <numeric>

namespace q4s {

std::vector<int32_t> hidden_order(const Weight& down, const Team& team) {
  constexpr int64_t kRows = 256;  // unpacked at a time
  const int64_t n = down.view.n, k = down.view.k;
  std::vector<double> size(k);
  std::vector<float> rows(std::min(n, kRows) * k);
  for (int64_t first = 0; first < n; first += kRows) {
    const int64_t count = std::min(kRows, n - first);
    unpack_rows(down, first, first + count, rows.data(), team);
    team([&](Part part) {
      const auto [begin, end] = part.of(k, 16);
      for (int64_t i = 0; i < count; ++i)
        for (int64_t j = begin; j < end; ++j) size[j] += double(rows[i * k + j]) * rows[i * k + j];
    });
  }
  std::vector<int32_t> order(k);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return size[a] > size[b]; });
  return order;
}

void order_hidden(WeightWork& work, const LlamaConfig& c, Unit u, float* w, const std::vector<int32_t>& order) {
  if (u == Unit::kDown) work.take_columns(w, c.dim, order);
  if (u != Unit::kGateUp) return;
  work.take_rows(w, c.dim, order);
  work.take_rows(w + c.hidden * c.dim, c.dim, order);
}

}  // namespace q4s
