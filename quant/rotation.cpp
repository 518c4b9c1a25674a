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
  std::vector<float> turned(k * r.dim);
  for (int64_t i = 0; i < r.dim; ++i)
    for (int64_t j = 0; j < k; ++j) turned[j * r.dim + i] = w[i * k + j];
  rotate_rows(r, turned.data(), k, team);
  for (int64_t i = 0; i < r.dim; ++i)
    for (int64_t j = 0; j < k; ++j) w[i * k + j] = turned[j * r.dim + i];
}

void fold_gain(const std::vector<float>& gain, float* w, int64_t n) {
  const int64_t k = int64_t(gain.size());
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < k; ++j) w[i * k + j] *= gain[j];
}

void rotate_block(BlockWeights& b, const LlamaConfig& c, const Rotation& r1, const Rotation& r2,
                  const Team& team) {
  fold_gain(b.attn_norm, b.qkv.data(), c.qkv_dim());
  fold_gain(b.mlp_norm, b.gate_up.data(), 2 * c.hidden);
  b.attn_norm.assign(c.dim, 1.0f);
  b.mlp_norm.assign(c.dim, 1.0f);
  rotate_rows(r1, b.qkv.data(), c.qkv_dim(), team);
  rotate_rows(r1, b.gate_up.data(), 2 * c.hidden, team);
  rotate_outputs(r1, b.o.data(), c.q_dim(), team);
  rotate_outputs(r1, b.down.data(), c.hidden, team);
  float* v = b.qkv.data() + (c.q_dim() + c.kv_dim()) * c.dim;
  for (int64_t h = 0; h < c.kv_heads; ++h) rotate_outputs(r2, v + h * c.head_dim * c.dim, c.dim, team);
  rotate_rows(r2, b.o.data(), c.dim * c.heads, team);  // every head's slice of every row
}

}  // namespace q4s
