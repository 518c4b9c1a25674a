// The definition of rope_kv.h; split over tokens. Each (sequence, position) of a step occurs once, so that
// threads never write the same cache row.
#include "kernels/rope_kv.h"

#include "kernels/cpu_kernels.h"
#include "kernels/half.h"

namespace q4s {
namespace {

// Element i of a cache row that starts at `row`.
void store(void* cache, KvType type, int64_t i, float v) {
  if (type == KvType::kF32)
    static_cast<float*>(cache)[i] = v;
  else
    static_cast<uint16_t*>(cache)[i] = float_to_half(v);
}

}  // namespace

void rope_kv_cpu(const RopeKvArgs& a, Part part) {
  const int64_t hd = a.head_dim, half = hd / 2, q_width = a.heads * hd, kv_width = a.kv_heads * hd;
  const auto [begin, end] = part.of(a.tokens);
  for (int64_t t = begin; t < end; ++t) {
    const float* qkv = a.qkv + t * (q_width + 2 * kv_width);
    const float* table = a.table + a.at.position[t] * hd;
    const int64_t row = (a.at.sequence[t] * a.kv.ctx + a.at.position[t]) * kv_width;
    for (int64_t h = 0; h < a.heads + a.kv_heads; ++h) {
      const float* x = qkv + h * hd;
      for (int64_t i = 0; i < half; ++i) {
        const double c = table[2 * i], s = table[2 * i + 1], x0 = x[i], x1 = x[i + half];
        const float y0 = float(x0 * c - x1 * s), y1 = float(x0 * s + x1 * c);
        if (h < a.heads) {
          a.q[t * q_width + h * hd + i] = y0;
          a.q[t * q_width + h * hd + half + i] = y1;
        } else {
          const int64_t at = row + (h - a.heads) * hd + i;
          store(a.kv.k, a.kv.type, at, y0);
          store(a.kv.k, a.kv.type, at + half, y1);
        }
      }
    }
    for (int64_t i = 0; i < kv_width; ++i) store(a.kv.v, a.kv.type, row + i, qkv[q_width + kv_width + i]);
  }
}

void rope_kv(const RopeKvArgs& a, Part part) {
  const auto [begin, end] = part.of(a.tokens);
  cpu_kernels().rope_kv(a, begin, end);
}

}  // namespace q4s
