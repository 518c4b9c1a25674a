// The definition of attention.h, and the online-softmax path; both split over (token, head).
#include "kernels/attention.h"

#include <cmath>
#include <vector>

#include "kernels/cpu_kernels.h"
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

size_t attention_scratch_bytes(int64_t, int64_t head_dim, int threads) {
  return size_t(round_up(cpu_kernels().attention_floats(head_dim) * 4, 64)) * size_t(threads);
}

void attention(const AttentionArgs& a, Part part) {
  constexpr int64_t kFew = 8;  // tokens; which way a query goes must not depend on the number of threads
  const CpuKernels& kernels = cpu_kernels();
  const int64_t shared = a.heads / a.kv_heads;
  if (a.tokens < kFew) {
    const int64_t heads = a.tokens * a.kv_heads < 2 * part.count ? 1 : shared;  // at a time
    const auto [begin, end] = part.of(a.tokens * a.heads / heads);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t h = i * heads % a.heads;
      kernels.attention_few(a, i * heads / a.heads, h, h + heads);
    }
    return;
  }
  // A unit of work: some tokens times the heads of one kv head (cut where they are many).
  const int64_t heads = std::min<int64_t>(shared, kernels.queries);
  // A multiple of 4 where it fits: queries are multiplied 4 (or 3) at a time.
  const int64_t most = kernels.queries / heads, tokens = most < 4 ? most : most / 4 * 4;
  const int64_t pieces = ceil_div(shared, heads), columns = a.kv_heads * pieces;
  auto* scratch = reinterpret_cast<float*>(a.scratch + attention_scratch_bytes(0, a.head_dim, part.index));
  // Later tokens see more rows: threads take units in turn, since equal shares would not be equal work.
  for (int64_t i = part.index; i < ceil_div(a.tokens, tokens) * columns; i += part.count) {
    const int64_t t = i / columns * tokens, kv_head = i % columns / pieces;
    const int64_t h = kv_head * shared + i % pieces * heads,
                  end = std::min(h + heads, (kv_head + 1) * shared);
    kernels.attention_many(a, t, std::min(a.tokens, t + tokens), h, end, scratch);
  }
}

}  // namespace q4s
