#include "quant/seed.h"

#include <algorithm>
#include <cassert>
#include <cmath>

#include "kernels/dense.h"

namespace q4s {
namespace {

constexpr int64_t kRows = 96;

struct Params {
  float scale, shift, low, high;
  float nearest(float w) const {
    return scale * (std::clamp(round_even(w / scale - shift), low, high) + shift);
  }
};

// From the range of a group; with zero points the levels are s (q - z), q in 0..15.
Params find_params(const float* w, int64_t k, GridKind kind) {
  float low = 0.0f, high = 0.0f, top = 0.0f;
  for (int64_t j = 0; j < k; ++j) {
    low = std::min(low, w[j]);
    high = std::max(high, w[j]);
    if (std::fabs(w[j]) > std::fabs(top)) top = w[j];
  }
  if (low == 0.0f && high == 0.0f) low = -1.0f, high = 1.0f, top = 1.0f;
  if (kind == GridKind::kAsym) {
    const float scale = (high - low) / 15.0f, zero = round_even(-low / scale);
    return {scale, 0.0f, -zero, 15.0f - zero};
  }
  const Levels l = grid_levels(kind);
  const float scale = std::fabs(top) / l.reach;
  return {l.negative && top > 0.0f ? -scale : scale, l.shift, float(l.low), float(l.high)};
}

}  // namespace

SeedResult seed_solve(const float* w, int64_t n, const HessianFactor& f, GridKind kind, int64_t group,
                      const Team& team) {
  assert(f.ok());
  const int64_t k = f.k;
  if (group == 0) group = k;
  SeedResult result;
  result.values.resize(n * k);
  std::vector<float> original(w, w + n * k);
  for (int64_t i = 0; i < n * k; ++i)
    if (f.dead[i % k]) original[i] = 0.0f;
  team([&](Part part) {
    const Part::Range range = part.of(n, kRows);
    for (int64_t first = range.begin; first < range.end; first += kRows) {
      const int64_t rows = std::min(kRows, n - first);
      std::vector<float> work(rows * k), err(rows * kGptqBlock), block(kGptqBlock);
      std::vector<Params> params(rows);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < k; ++i) work[r * k + i] = original[(first + r) * k + f.order[i]];
      for (int64_t begin = 0; begin < k; begin += kGptqBlock) {
        const int64_t size = std::min(kGptqBlock, k - begin), end = begin + size;
        for (int64_t r = 0; r < rows; ++r) {
          float* row = &work[r * k];
          std::copy(row + begin, row + end, block.begin());
          for (int64_t i = 0; i < size; ++i) {
            const int64_t column = begin + i;
            if (column % group == 0) params[r] = find_params(row + column, std::min(group, k - column), kind);
            const float* u = &f.u[column * k + begin];
            const float value = params[r].nearest(block[i]), e = (block[i] - value) / u[i];
            result.values[(first + r) * k + f.order[column]] = value;
            err[r * kGptqBlock + i] = e;
            for (int64_t j = i + 1; j < size; ++j) block[j] -= e * u[j];
          }
        }
        dense_gemm(Transpose::kNo, Transpose::kNo, rows, k - end, size, -1.0f, err.data(), kGptqBlock,
                   f.u.data() + begin * k + end, k, 1.0f, work.data() + end, k);
      }
    }
  });
  result.rows = row_losses(original.data(), result.values.data(), f, n, team);
  return result;
}

}  // namespace q4s
