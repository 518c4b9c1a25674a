// Attention over the cache with an online softmax, kKeys cache rows at a time, in two ways: few tokens read
// keys and values once each, straight from the cache, for the heads that share them; many tokens first unpack
// a block of keys (transposed) and values to f32, which a block of queries then multiplies with. Whatever
// block a query is in, it goes through the same additions, so the split over threads never shows.
#pragma once
#include "kernels/cpu_kernels.h"
#include "kernels/simd.h"

namespace q4s {
namespace {

constexpr int kKeys = 4 * kW;
constexpr int kQueries = 64;
constexpr int kQueriesAtOnce = kW == 16 ? 4 : 3;  // times 4 vectors of sums: what the registers hold

struct Query {
  const float* q;  // (head_dim)
  float* y;        // (head_dim)
  int64_t keys;    // position + 1
  float top, total;
};

// kW elements of the cache from `at`; of them n, the others 0.
template <KvType type>
F load_cache(const void* cache, int64_t at) {
  if constexpr (type == KvType::kF32) return loadf(static_cast<const float*>(cache) + at);
  return load_half(static_cast<const uint16_t*>(cache) + at);
}
template <KvType type>
F load_cache(const void* cache, int64_t at, int64_t n) {
  if (n >= kW) return load_cache<type>(cache, at);
  if constexpr (type == KvType::kF32) return loadf_n(static_cast<const float*>(cache) + at, n);
  return load_half_n(static_cast<const uint16_t*>(cache) + at, n);
}

// Scores s of the block's keys, of which `n` count, to weights p and the factor that older sums shrink by.
inline float weigh(Query& u, F (&s)[4], int64_t n, float scale, float* p) {
  I lane;
  for (int i = 0; i < kW; ++i) lane[i] = i;
  F best = splat(-__builtin_inff());
  for (int b = 0; b < 4; ++b) {
    s[b] = lane + b * kW < int32_t(n) ? s[b] * scale : splat(-__builtin_inff());
    best = max(best, s[b]);
  }
  const float block_top = max_of(best), top = block_top > u.top ? block_top : u.top;
  const float shrink =
      top == u.top ? 1.f : exp(splat(u.top - top))[0];  // 0 at first: the old maximum is -infinity
  F total{};
  for (int b = 0; b < 4; ++b) {
    const F e = exp(s[b] - top);
    store(p + b * kW, e);
    total += e;
  }
  u.total = u.total * shrink + sum(total);
  u.top = top;
  return shrink;
}

// ---- few tokens ----

// M queries with the same number of keys; at: element of the kv head's first cache row.
template <KvType type, int M>
void attend_directly(Query* u, const KvLayer& kv, int64_t at, int64_t stride, int64_t hd, float scale) {
  for (int m = 0; m < M; ++m) std::memset(u[m].y, 0, size_t(hd) * 4);
  for (int64_t first = 0; first < u[0].keys; first += kKeys, at += kKeys * stride) {
    const int64_t n = min64(kKeys, u[0].keys - first);
    F s[M][4] = {};
    for (int b = 0; b * kW < n; ++b) {
      F part[M][kW] = {};
      for (int64_t j = 0; j < min64(kW, n - b * kW); ++j) {
        const int64_t row = at + (b * kW + j) * stride;
        F acc[M] = {};
        int64_t i = 0;
        for (; i + kW <= hd; i += kW) {
          const F k = load_cache<type>(kv.k, row + i);
          for (int m = 0; m < M; ++m) acc[m] = fma(loadf(u[m].q + i), k, acc[m]);
        }
        if (i < hd) {
          const F k = load_cache<type>(kv.k, row + i, hd - i);
          for (int m = 0; m < M; ++m) acc[m] = fma(loadf_n(u[m].q + i, hd - i), k, acc[m]);
        }
        for (int m = 0; m < M; ++m) part[m][j] = acc[m];
      }
      for (int m = 0; m < M; ++m) s[m][b] = sums(part[m]);
    }
    float p[M][kKeys], shrink[M];
    for (int m = 0; m < M; ++m) shrink[m] = weigh(u[m], s[m], n, scale, p[m]);

    constexpr int kRun = 4;
    int64_t i = 0;
    for (; i + kRun * kW <= hd; i += kRun * kW) {
      F acc[M][kRun];
      for (int m = 0; m < M; ++m)
        for (int r = 0; r < kRun; ++r) acc[m][r] = loadf(u[m].y + i + r * kW) * shrink[m];
      for (int64_t j = 0; j < n; ++j)
        for (int r = 0; r < kRun; ++r) {
          const F v = load_cache<type>(kv.v, at + j * stride + i + r * kW);
          for (int m = 0; m < M; ++m) acc[m][r] = fma(splat(p[m][j]), v, acc[m][r]);
        }
      for (int m = 0; m < M; ++m)
        for (int r = 0; r < kRun; ++r) store(u[m].y + i + r * kW, acc[m][r]);
    }
    for (; i < hd; i += kW) {
      const int64_t width = min64(kW, hd - i);
      F acc[M];
      for (int m = 0; m < M; ++m) acc[m] = loadf_n(u[m].y + i, width) * shrink[m];
      for (int64_t j = 0; j < n; ++j) {
        const F v = load_cache<type>(kv.v, at + j * stride + i, width);
        for (int m = 0; m < M; ++m) acc[m] = fma(splat(p[m][j]), v, acc[m]);
      }
      for (int m = 0; m < M; ++m) storef_n(u[m].y + i, acc[m], width);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int64_t i = 0; i < hd; ++i) u[m].y[i] /= u[m].total;
}

template <KvType type>
void attention_heads(const AttentionArgs& a, int64_t t, int64_t h0, int64_t h1) {
  const int64_t hd = a.head_dim, stride = a.kv_heads * hd, kv_head = h0 / (a.heads / a.kv_heads);
  const int64_t at = a.at.sequence[t] * a.kv.ctx * stride + kv_head * hd;
  const float scale = 1 / __builtin_sqrtf(float(hd));
  for (int64_t h = h0; h < h1;) {
    const int64_t many = min64(kQueriesAtOnce, h1 - h);
    Query u[kQueriesAtOnce];
    for (int64_t i = 0; i < many; ++i) {
      const int64_t at_q = (t * a.heads + h + i) * hd;
      u[i] = {a.q + at_q, a.y + at_q, a.at.position[t] + 1, -__builtin_inff(), 0};
    }
    if constexpr (kQueriesAtOnce == 4)
      if (many == 4) attend_directly<type, 4>(u, a.kv, at, stride, hd, scale);
    if (many == 3) attend_directly<type, 3>(u, a.kv, at, stride, hd, scale);
    if (many == 2) attend_directly<type, 2>(u, a.kv, at, stride, hd, scale);
    if (many == 1) attend_directly<type, 1>(u, a.kv, at, stride, hd, scale);
    h += many;
  }
}

// ---- many tokens ----

constexpr int64_t padded_head(int64_t hd) { return div_up(hd, 4 * kW) * 4 * kW; }

// Scratch of one thread, floats.
struct AttentionScratch {
  float* k;  // (head_dim, kKeys): a block's keys, transposed
  float* v;  // (kKeys, padded head)
  float* y;  // (kQueries, padded head): running sums of values
};
int64_t attention_floats(int64_t hd) { return hd * kKeys + (kKeys + kQueries) * padded_head(hd); }

template <KvType type>
void unpack_block(const KvLayer& kv, int64_t at, int64_t stride, int64_t n, int64_t hd,
                  const AttentionScratch& s) {
  for (int64_t d = 0; d < hd; d += kW) {
    const int64_t width = min64(kW, hd - d);
    for (int64_t b = 0; b < kKeys; b += kW) {
      F rows[kW] = {};
      for (int64_t j = 0; j < kW; ++j)
        if (b + j < n) rows[j] = load_cache<type>(kv.k, at + (b + j) * stride + d, width);
      transpose(rows);
      for (int64_t i = 0; i < width; ++i) store(s.k + (d + i) * kKeys + b, rows[i]);
    }
  }
  const int64_t padded = padded_head(hd);
  for (int64_t j = 0; j < n; ++j)
    for (int64_t d = 0; d < padded; d += kW)
      store(s.v + j * padded + d,
            d < hd ? load_cache<type>(kv.v, at + j * stride + d, min64(kW, hd - d)) : F{});
}

// c[m] = c[m] * factor[m] + a[m] (n) times b (n, 4 vectors of row stride ld). Not inlined: the sums need
// nearly all registers.
template <int M>
__attribute__((noinline)) void multiply_few(const float* const (&a)[M], int64_t n, const float* b, int64_t ld,
                                            const float (&factor)[M], float* const (&c)[M]) {
  F acc[M][4];
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < 4; ++v) acc[m][v] = loadf(c[m] + v * kW) * factor[m];
  for (int64_t j = 0; j < n; ++j, b += ld)
    for (int v = 0; v < 4; ++v) {
      const F x = loadf(b + v * kW);
      for (int m = 0; m < M; ++m) acc[m][v] = fma(splat(a[m][j]), x, acc[m][v]);
    }
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < 4; ++v) store(c[m] + v * kW, acc[m][v]);
}

// M neighbouring queries, whose sums are rows of y, with the block of keys from `first` on, of which n are
// unpacked.
template <int M>
void attend_block(Query* u, const AttentionScratch& s, float* y, int64_t first, int64_t n, int64_t hd,
                  float scale) {
  float p[M][kKeys] = {}, shrink[M] = {};
  const float *q[M], *weights[M];
  float* sums[M];
  for (int m = 0; m < M; ++m) q[m] = u[m].q, weights[m] = sums[m] = p[m];
  multiply_few<M>(q, hd, s.k, kKeys, shrink, sums);
  for (int m = 0; m < M; ++m) {
    F score[4];
    for (int b = 0; b < 4; ++b) score[b] = loadf(p[m] + b * kW);
    const int64_t seen = u[m].keys - first;
    shrink[m] = weigh(u[m], score, seen < n ? seen : n, scale, p[m]);
  }
  const int64_t padded = padded_head(hd);
  for (int64_t d = 0; d < padded; d += 4 * kW) {
    for (int m = 0; m < M; ++m) sums[m] = y + m * padded + d;
    multiply_few<M>(weights, n, s.v + d, padded, shrink, sums);
  }
}

template <KvType type>
void attention_tile(const AttentionArgs& a, int64_t t0, int64_t t1, int64_t h0, int64_t h1, float* scratch) {
  const int64_t hd = a.head_dim, padded = padded_head(hd), stride = a.kv_heads * hd;
  const int64_t kv_head = h0 / (a.heads / a.kv_heads);
  const float scale = 1 / __builtin_sqrtf(float(hd));
  AttentionScratch s;
  s.k = scratch;
  s.v = s.k + hd * kKeys;
  s.y = s.v + kKeys * padded;
  for (int64_t t = t0; t < t1;) {
    Query u[kQueries];
    int64_t count = 0, most = 0;
    const int32_t sequence = a.at.sequence[t];
    for (; t < t1 && a.at.sequence[t] == sequence; ++t)
      for (int64_t h = h0; h < h1; ++h) {
        const int64_t at = (t * a.heads + h) * hd, keys = a.at.position[t] + 1;
        u[count++] = {a.q + at, a.y + at, keys, -__builtin_inff(), 0};
        most = most > keys ? most : keys;
      }
    std::memset(s.y, 0, size_t(count * padded) * 4);
    for (int64_t first = 0; first < most; first += kKeys) {
      const int64_t n = min64(kKeys, most - first);
      unpack_block<type>(a.kv, (sequence * a.kv.ctx + first) * stride + kv_head * hd, stride, n, hd, s);
      for (int64_t i = 0; i < count; i += kQueriesAtOnce) {
        if (i + kQueriesAtOnce <= count) {
          attend_block<kQueriesAtOnce>(u + i, s, s.y + i * padded, first, n, hd, scale);
        } else {
          for (int64_t j = i; j < count; ++j)
            attend_block<1>(u + j, s, s.y + j * padded, first, n, hd, scale);
        }
      }
    }
    for (int64_t i = 0; i < count; ++i)
      for (int64_t d = 0; d < hd; ++d) u[i].y[d] = s.y[i * padded + d] / u[i].total;
  }
}

void attention_few(const AttentionArgs& a, int64_t t, int64_t h0, int64_t h1) {
  if (a.kv.type == KvType::kF32)
    attention_heads<KvType::kF32>(a, t, h0, h1);
  else
    attention_heads<KvType::kF16>(a, t, h0, h1);
}
void attention_many(const AttentionArgs& a, int64_t t0, int64_t t1, int64_t h0, int64_t h1, float* scratch) {
  if (a.kv.type == KvType::kF32)
    attention_tile<KvType::kF32>(a, t0, t1, h0, h1, scratch);
  else
    attention_tile<KvType::kF16>(a, t0, t1, h0, h1, scratch);
}

}  // namespace
}  // namespace q4s
