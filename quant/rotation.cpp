#include "quant/rotation.h"

#include <cmath>
#include <numbers>

#include "kernels/rotate.h"

namespace q4s {

Rotation make_rotation(int64_t dim, uint64_t seed) {
  Rotation r;
  r.dim = dim;
  r.m = dim;
  while (r.m % 2 == 0) r.m /= 2;
  r.signs.resize(dim);
  for (float& s : r.signs) {  // splitmix64
    uint64_t z = seed += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    s = (z ^ z >> 31) & 1 ? -1.0f : 1.0f;
  }
  r.factor.resize(r.m * r.m);
  for (int64_t i = 0; i < r.m; ++i) {
    for (int64_t j = 0; j < r.m; ++j) {
      const double angle = 2.0 * std::numbers::pi * double(i * j % r.m) / double(r.m);
      r.factor[i * r.m + j] = float((std::cos(angle) + std::sin(angle)) / std::sqrt(double(r.m)));
    }
  }
  return r;
}

void rotate_rows(const Rotation& r, float* w, int64_t rows, const Team& team) {
  team([&](Part part) {
    rotate_cpu({w, r.signs.data(), r.factor.data(), w, rows, r.dim, r.m, false}, part);
  });
}

void rotate_outputs(const Rotation& r, float* w, int64_t k, const Team& team) {
  constexpr int64_t kTile = 64;  // columns whose transpose stays in the cache
  team([&](Part part) {
    std::vector<float> turned(kTile * r.dim);
    const auto [begin, end] = part.of(k, kTile);
    for (int64_t first = begin; first < end; first += kTile) {
      const int64_t size = std::min(kTile, end - first);
      for (int64_t i = 0; i < r.dim; ++i)
        for (int64_t j = 0; j < size; ++j) turned[j * r.dim + i] = w[i * k + first + j];
      rotate_cpu({turned.data(), r.signs.data(), r.factor.data(), turned.data(), size, r.dim, r.m, false});
      for (int64_t i = 0; i < r.dim; ++i)
        for (int64_t j = 0; j < size; ++j) w[i * k + first + j] = turned[j * r.dim + i];
    }
  });
}

void fold_gain(const std::vector<float>& gain, float* w, int64_t n) {
  const int64_t k = int64_t(gain.size());
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < k; ++j) w[i * k + j] *= gain[j];
}

}  // namespace q4s
