#include "quant/row_coupling.h"

#include <algorithm>
#include <cassert>

namespace q4s {
namespace {

constexpr int64_t kSteps = 8;
constexpr double kDamp = 0.1;

int64_t step_size(int64_t size) { return ceil_div(size, kSteps); }

// f[i][j] (size, size) = rows of U_bb^-1 U_b,rest for each step b; zero elsewhere. Columns are independent.
void fill_feedback(const std::vector<float>& u, int64_t size, float* f, const Team& team) {
  team([&](Part part) {
    const auto [first, last] = part.of(size);
    std::vector<double> row(size);
    for (int64_t begin = 0; begin < size; begin += step_size(size)) {
      const int64_t end = std::min(size, begin + step_size(size)), from = std::max(end, first);
      for (int64_t i = end - 1; i >= begin && from < last; --i) {
        for (int64_t j = from; j < last; ++j) row[j] = u[i * size + j];
        for (int64_t l = i + 1; l < end; ++l)
          for (int64_t j = from; j < last; ++j) row[j] -= double(u[i * size + l]) * f[l * size + j];
        for (int64_t j = from; j < last; ++j) f[i * size + j] = float(row[j] / u[i * size + i]);
      }
    }
  });
}

}  // namespace

std::vector<RowCoupling::Step> RowCoupling::steps() const {
  std::vector<Step> all;
  for (int64_t rank = 0; rank < size; rank += step_size(size)) {
    const int64_t end = std::min(size, rank + step_size(size));
    all.push_back({rank == 0 ? 0 : free_rows() + rank * blocks, free_rows() + end * blocks, rank, end});
  }
  return all;
}

RowCoupling couple_rows(const std::vector<float>& metric, int64_t blocks, int64_t size, int64_t n,
                        const Team& team, const MetricFactor& factor) {
  assert(int64_t(metric.size()) == blocks * size * size && blocks * size <= n);
  RowCoupling c{blocks, size, std::vector<int32_t>(n), std::vector<float>(metric.size())};
  const int64_t free = c.free_rows();
  for (int64_t i = 0; i < free; ++i) c.rows[i] = int32_t(blocks * size + i);
  std::vector<uint8_t> ok(blocks);
  const auto couple = [&](int64_t b, const Team& workers) {
    const auto begin = metric.begin() + b * size * size;
    std::vector<float> h(begin, begin + size * size);
    const HessianFactor f = factor && blocks == 1 ? factor(std::move(h), size, kDamp)
                                                  : factor_hessian(std::move(h), size, kDamp, true, workers);
    if (!(ok[b] = f.ok())) return;
    for (int64_t rank = 0; rank < size; ++rank)
      c.rows[free + rank * blocks + b] = int32_t(b * size + f.order[rank]);
    fill_feedback(f.u, size, &c.feedback[b * size * size], workers);
  };
  if (blocks == 1) {
    couple(0, team);
  } else {
    team([&](Part part) {
      const auto [first, last] = part.of(blocks);
      for (int64_t b = first; b < last; ++b) couple(b, one_thread_team);
    });
  }
  if (!std::all_of(ok.begin(), ok.end(), [](uint8_t v) { return v != 0; })) return {};
  return c;
}

}  // namespace q4s
