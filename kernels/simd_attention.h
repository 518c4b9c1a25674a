// Attention over the cache with an online softmax, kKeys cache rows at a time. A block of queries (tokens of
// one sequence times the heads that share a kv head) uses each block of keys and values while it is in the
// cache. Every query goes through the same additions whatever block it is in, so the split over threads never
// shows.
#pragma once
#include "kernels/cpu_kernels.h"
#include "kernels/simd.h"

namespace q4s {
namespace {

constexpr int kKeys = 4 * kW;
constexpr int kQueries = 32;

struct Query {
  const float* q;  // (head_dim)
  float* y;        // (head_dim), the running weighted sum of values
  int64_t keys;    // position + 1
  float top, total;
};

// n rows of one kv head as f32, (n, hd); straight from an f32 cache into `out` too: rows become neighbours.
inline void gather_rows(const void* cache, KvType type, int64_t at, int64_t stride, int64_t n, int64_t hd,
                        float* out) {
  for (int64_t j = 0; j < n; ++j, at += stride, out += hd) {
    if (type == KvType::kF32) {
      std::memcpy(out, static_cast<const float*>(cache) + at, size_t(hd) * 4);
      continue;
    }
    const uint16_t* h = static_cast<const uint16_t*>(cache) + at;
    int64_t i = 0;
    for (; i + kW <= hd; i += kW) store(out + i, load_half(h + i));
    if (i < hd) {
      uint16_t last[kW] = {};
      std::memcpy(last, h + i, size_t(hd - i) * 2);
      storef_n(out + i, load_half(last), hd - i);
    }
  }
}

// s[j] = q . k[j] for kKeys rows (those from n on are garbage that the caller masks, but readable).
inline void scores_of(const float* q, const float* k, int64_t hd, F (&s)[4]) {
  for (int b = 0; b < 4; ++b, k += kW * hd) {
    F part[kW];
    for (int j = 0; j < kW; ++j) {
      F acc{};
      int64_t i = 0;
      for (; i + kW <= hd; i += kW) acc = fma(loadf(q + i), loadf(k + j * hd + i), acc);
      if (i < hd) acc = fma(loadf_n(q + i, hd - i), loadf_n(k + j * hd + i, hd - i), acc);
      part[j] = acc;
    }
    s[b] = sums(part);
  }
}

// y = y * shrink + p v, v (n, hd).
inline void add_values(float* y, float shrink, const float* p, const float* v, int64_t n, int64_t hd) {
  constexpr int kRun = 4;
  int64_t i = 0;
  for (; i + kRun * kW <= hd; i += kRun * kW) {
    F acc[kRun];
    for (int r = 0; r < kRun; ++r) acc[r] = loadf(y + i + r * kW) * shrink;
    for (int64_t j = 0; j < n; ++j)
      for (int r = 0; r < kRun; ++r) acc[r] = fma(splat(p[j]), loadf(v + j * hd + i + r * kW), acc[r]);
    for (int r = 0; r < kRun; ++r) store(y + i + r * kW, acc[r]);
  }
  for (; i < hd; i += kW) {
    const int64_t m = min64(kW, hd - i);
    F acc = loadf_n(y + i, m) * shrink;
    for (int64_t j = 0; j < n; ++j) acc = fma(splat(p[j]), loadf_n(v + j * hd + i, m), acc);
    storef_n(y + i, acc, m);
  }
}

inline void attend(Query& u, const float* k, const float* v, int64_t first, int64_t hd, float scale) {
  const int64_t n = min64(kKeys, u.keys - first);
  if (n <= 0) return;
  F s[4];
  scores_of(u.q, k, hd, s);
  I lane;
  for (int i = 0; i < kW; ++i) lane[i] = i;
  F best = splat(-__builtin_inff());
  for (int b = 0; b < 4; ++b) {
    s[b] = lane + b * kW < int32_t(n) ? s[b] * scale : splat(-__builtin_inff());
    best = max(best, s[b]);
  }
  const float block_top = max_of(best), top = block_top > u.top ? block_top : u.top;
  const float shrink = exp(splat(u.top - top))[0];  // 0 for the first block: its old maximum is -infinity
  F total{};
  float p[kKeys];
  for (int b = 0; b < 4; ++b) {
    const F e = exp(s[b] - top);
    store(p + b * kW, e);
    total += e;
  }
  u.total = u.total * shrink + sum(total);
  u.top = top;
  add_values(u.y, shrink, p, v, n, hd);
}

// Scratch: k and v of a block, 2 * kKeys * head_dim floats.
void attention_block(const AttentionArgs& a, int64_t t0, int64_t t1, int64_t h0, int64_t h1, float* scratch) {
  const int64_t hd = a.head_dim, kv_width = a.kv_heads * hd, kv_head = h0 / (a.heads / a.kv_heads);
  const float scale = 1 / __builtin_sqrtf(float(hd));
  float *k = scratch, *v = scratch + kKeys * hd;
  for (int64_t t = t0; t < t1;) {
    Query queries[kQueries];
    int64_t count = 0, most = 0;
    const int32_t sequence = a.at.sequence[t];
    for (; t < t1 && a.at.sequence[t] == sequence && count + (h1 - h0) <= kQueries; ++t)
      for (int64_t h = h0; h < h1; ++h) {
        const int64_t at = (t * a.heads + h) * hd, keys = a.at.position[t] + 1;
        queries[count++] = {a.q + at, a.y + at, keys, -__builtin_inff(), 0};
        std::memset(a.y + at, 0, size_t(hd) * 4);
        most = most > keys ? most : keys;
      }
    for (int64_t first = 0; first < most; first += kKeys) {
      const int64_t n = min64(kKeys, most - first);
      const int64_t at = (sequence * a.kv.ctx + first) * kv_width + kv_head * hd;
      gather_rows(a.kv.k, a.kv.type, at, kv_width, n, hd, k);
      gather_rows(a.kv.v, a.kv.type, at, kv_width, n, hd, v);
      for (int64_t i = 0; i < count; ++i) attend(queries[i], k, v, first, hd, scale);
    }
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = 0; j < hd; ++j) queries[i].y[j] /= queries[i].total;
  }
}

}  // namespace
}  // namespace q4s
