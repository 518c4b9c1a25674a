// The definition of attention.h, and the online-softmax path; both split over (token, head).
#include "kernels/attention.h"

#include <cmath>
#include <vector>

#include "kernels/half.h"

namespace q4s {
namespace {

float load(const void* cache, KvType type, int64_t i) {
  return type == KvType::kF32 ? static_cast<const float*>(cache)[i]
                              : half_to_float(static_cast<const uint16_t*>(cache)[i]);
}

}  // namespace

void attention_cpu(const AttentionArgs& a, Part part) {
  const int64_t hd = a.head_dim, kv_width = a.kv_heads * hd, shared = a.heads / a.kv_heads;
  const double scale = 1 / std::sqrt(double(hd));
  std::vector<double> p, sum(hd);
  const auto [begin, end] = part.of(a.tokens * a.heads);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t t = item / a.heads, h = item % a.heads, n = a.at.position[t] + 1;
    const int64_t base = a.at.sequence[t] * a.kv.ctx * kv_width + h / shared * hd;
    const float* q = a.q + item * hd;
    p.assign(n, 0);
    double top = -INFINITY, total = 0;
    for (int64_t j = 0; j < n; ++j) {
      for (int64_t i = 0; i < hd; ++i)
        p[j] += q[i] * double(load(a.kv.k, a.kv.type, base + j * kv_width + i));
      p[j] *= scale;
      top = std::max(top, p[j]);
    }
    for (double& v : p) total += v = std::exp(v - top);
    sum.assign(hd, 0);
    for (int64_t j = 0; j < n; ++j)
      for (int64_t i = 0; i < hd; ++i) sum[i] += p[j] * load(a.kv.v, a.kv.type, base + j * kv_width + i);
    for (int64_t i = 0; i < hd; ++i) a.y[item * hd + i] = float(sum[i] / total);
  }
}

size_t attention_scratch_bytes(int64_t, int64_t, int) { return 0; }

void attention(const AttentionArgs& a, Part part) {
  const int64_t hd = a.head_dim, kv_width = a.kv_heads * hd, shared = a.heads / a.kv_heads;
  const float scale = float(1 / std::sqrt(double(hd)));
  const auto [begin, end] = part.of(a.tokens * a.heads);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t t = item / a.heads, h = item % a.heads, n = a.at.position[t] + 1;
    const int64_t base = a.at.sequence[t] * a.kv.ctx * kv_width + h / shared * hd;
    const float* q = a.q + item * hd;
    float* y = a.y + item * hd;
    float top = -INFINITY, total = 0;
    for (int64_t i = 0; i < hd; ++i) y[i] = 0;
    for (int64_t j = 0; j < n; ++j) {
      float s = 0;
      for (int64_t i = 0; i < hd; ++i) s += q[i] * load(a.kv.k, a.kv.type, base + j * kv_width + i);
      s *= scale;
      if (s > top) {  // rescale what was summed under the old maximum
        const float shrink = std::exp(top - s);
        for (int64_t i = 0; i < hd; ++i) y[i] *= shrink;
        total *= shrink;
        top = s;
      }
      const float w = std::exp(s - top);
      total += w;
      for (int64_t i = 0; i < hd; ++i) y[i] += w * load(a.kv.v, a.kv.type, base + j * kv_width + i);
    }
    for (int64_t i = 0; i < hd; ++i) y[i] /= total;
  }
}

}  // namespace q4s
