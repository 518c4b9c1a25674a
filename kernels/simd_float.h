// The float operations around the products: rms_norm, swiglu, rope_kv, rotate. Contracts in their own
// headers.
#pragma once
#include "kernels/cpu_kernels.h"
#include "kernels/simd.h"

namespace q4s {
namespace {

inline float root(float v) { return __builtin_sqrtf(v); }

void rms_norm_tokens(const RmsNormArgs& a, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    const float* x = a.x + t * a.dim;
    float* y = a.y + t * a.dim;
    F squares[4] = {};
    int64_t i = 0;
    for (; i + 4 * kW <= a.dim; i += 4 * kW)
      for (int s = 0; s < 4; ++s) {
        const F v = loadf(x + i + s * kW);
        squares[s] = fma(v, v, squares[s]);
      }
    for (; i < a.dim; i += kW) {
      const F v = loadf_n(x + i, min64(kW, a.dim - i));
      squares[0] = fma(v, v, squares[0]);
    }
    const float mean = sum((squares[0] + squares[1]) + (squares[2] + squares[3])) / float(a.dim);
    const F scale = splat(1 / root(mean + a.eps));
    for (i = 0; i + kW <= a.dim; i += kW) store(y + i, loadf(a.w + i) * (loadf(x + i) * scale));
    if (const int64_t n = a.dim - i; n) storef_n(y + i, loadf_n(a.w + i, n) * (loadf_n(x + i, n) * scale), n);
  }
}

inline F silu(F g) {
  const F e = exp(-g > 88.f ? splat(88.f) : -g);  // a NaN passes; below -88 the product is 0 to 1e-36
  return g / (e + 1.f);
}

void swiglu_columns(const SwigluArgs& a, int64_t t, int64_t begin, int64_t end) {
  const float *gate = a.x + t * 2 * a.hidden, *up = gate + a.hidden;
  float* y = a.y + t * a.hidden;
  int64_t i = begin;
  for (; i + kW <= end; i += kW) store(y + i, silu(loadf(gate + i)) * loadf(up + i));
  if (const int64_t n = end - i; n) storef_n(y + i, silu(loadf_n(gate + i, n)) * loadf_n(up + i, n), n);
}

// n floats to the cache, from element `at`.
inline void store_cache(void* cache, KvType type, int64_t at, const float* x, int64_t n) {
  if (type == KvType::kF32) {
    std::memcpy(static_cast<float*>(cache) + at, x, size_t(n) * 4);
    return;
  }
  uint16_t* y = static_cast<uint16_t*>(cache) + at;
  int64_t i = 0;
  for (; i + kW <= n; i += kW) store_half(y + i, loadf(x + i));
  if (i < n) {
    uint16_t last[kW];
    store_half(last, loadf_n(x + i, n - i));
    std::memcpy(y + i, last, size_t(n - i) * 2);
  }
}

// Pairs [i, i+n) of one head: low and high are columns i.. and half+i.. rotated.
inline void rotate_pairs(const float* x, const float* table, int64_t half, int64_t i, int64_t n, float* low,
                         float* high) {
  for (int64_t j = 0; j < n; ++j) {
    const float c = table[2 * (i + j)], s = table[2 * (i + j) + 1], a = x[i + j], b = x[i + j + half];
    low[j] = a * c - b * s;
    high[j] = a * s + b * c;
  }
}

void rope_kv_tokens(const RopeKvArgs& a, int64_t begin, int64_t end) {
  constexpr int64_t kPairs = 64;  // at a time, for a cache of halves
  const int64_t hd = a.head_dim, half = hd / 2, q_width = a.heads * hd, kv_width = a.kv_heads * hd;
  for (int64_t t = begin; t < end; ++t) {
    const float* qkv = a.qkv + t * (q_width + 2 * kv_width);
    const float* table = a.table + a.at.position[t] * hd;
    const int64_t row = (a.at.sequence[t] * a.kv.ctx + a.at.position[t]) * kv_width;
    for (int64_t h = 0; h < a.heads; ++h) {
      float* q = a.q + t * q_width + h * hd;
      rotate_pairs(qkv + h * hd, table, half, 0, half, q, q + half);
    }
    for (int64_t h = 0; h < a.kv_heads; ++h)
      for (int64_t i = 0; i < half; i += kPairs) {
        const int64_t n = min64(kPairs, half - i), at = row + h * hd + i;
        float low[kPairs], high[kPairs];
        rotate_pairs(qkv + q_width + h * hd, table, half, i, n, low, high);
        store_cache(a.kv.k, a.kv.type, at, low, n);
        store_cache(a.kv.k, a.kv.type, at + half, high, n);
      }
    store_cache(a.kv.v, a.kv.type, row, qkv + q_width + kv_width, kv_width);
  }
}

// x = (H_p (x) I_m) x, unnormalised, in place: butterflies over runs of h*m neighbours.
inline void hadamard(float* x, int64_t p, int64_t m) {
  for (int64_t run = m; run < p * m; run *= 2)
    for (int64_t i = 0; i < p * m; i += 2 * run) {
      float *a = x + i, *b = a + run;
      int64_t j = 0;
      for (; j + kW <= run; j += kW) {
        const F u = loadf(a + j), v = loadf(b + j);
        store(a + j, u + v);
        store(b + j, u - v);
      }
      for (; j < run; ++j) {
        const float u = a[j], v = b[j];
        a[j] = u + v;
        b[j] = u - v;
      }
    }
}

// Rows of m <= kMostFactor columns times M (or its transpose), in place.
inline void multiply_factor(float* x, const float* factor, int64_t p, int64_t m, bool transposed,
                            float scale) {
  float row[kMostFactor];
  for (int64_t i = 0; i < p; ++i, x += m) {
    for (int64_t j = 0; j < m; ++j) {
      float total = 0;
      for (int64_t l = 0; l < m; ++l) total += x[l] * (transposed ? factor[j * m + l] : factor[l * m + j]);
      row[j] = total * scale;
    }
    for (int64_t j = 0; j < m; ++j) x[j] = row[j];
  }
}

void rotate_tokens(const RotateArgs& a, int64_t begin, int64_t end) {
  const int64_t p = a.dim / a.m;
  const float scale = 1 / root(float(p));
  for (int64_t t = begin; t < end; ++t) {
    const float* x = a.x + t * a.dim;
    float* y = a.y + t * a.dim;
    for (int64_t i = 0; i < a.dim; ++i) y[i] = a.inverse ? x[i] : x[i] * a.signs[i];
    hadamard(y, p, a.m);
    multiply_factor(y, a.factor, p, a.m, a.inverse, scale);
    if (a.inverse)
      for (int64_t i = 0; i < a.dim; ++i) y[i] *= a.signs[i];
  }
}

}  // namespace
}  // namespace q4s
