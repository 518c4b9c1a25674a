// Activations to int8: f32 rows as simd_int8.h lays them out for the vector and the matrix product.
#pragma once
#include "kernels/simd_int8.h"

namespace q4s {
namespace {

constexpr int64_t kSpan = 128;  // columns quantised at a time: 4 blocks

struct Span {
  alignas(64) int8_t q[kSpan];
  alignas(64) int32_t sum[kSpan / 4];  // of 4 columns each
  float scale[kSpan / kBlock];
};

// Columns x[0..n) as blocks, the rest zeros.
inline void quantize_span(const float* x, int64_t n, Span& span) {
  constexpr int kVectors = kBlock / kW;
  constexpr float kMagic = 12582912;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  for (int b = 0; b < kSpan / kBlock; ++b) {
    F v[kVectors];
    U top{};  // of |x| as integers, which order like floats and put NaN on top
    for (int i = 0; i < kVectors; ++i) {
      const int64_t at = b * kBlock + i * kW;
      v[i] = at + kW <= n ? loadf(x + at) : loadf_n(x + at, clamp64(n - at, 0, kW));
      top = max(top, U(v[i]) & 0x7fffffff);
    }
    const float amax = __builtin_bit_cast(float, max_of(top));
    const bool zero = amax < 1e-35f;  // the inverse of less may overflow; such a block counts as zero
    const float inverse = zero ? 0.f : 127 / amax;
    span.scale[b] = zero ? 0.f : amax / 127;
    for (int i = 0; i < kVectors; ++i) {
      const I q = I(U(v[i] * inverse + kMagic) - U(splat(kMagic)));
      store(span.q + b * kBlock + i * kW, narrow(q));
    }
  }
  for (int i = 0; i < kSpan; i += kBytes) store(span.sum + i / 4, sums_of_4(load<B>(span.q + i)));
}

// 32 neighbours: the even ones to even[0..16), the odd ones to odd[0..16).
inline void split_columns(const int8_t* q, int8_t* even, int8_t* odd) {
  typedef uint16_t Pairs __attribute__((vector_size(16)));
  typedef uint8_t Bytes __attribute__((vector_size(8)));
  for (int i = 0; i < 2; ++i) {
    const Pairs v = load<Pairs>(q + 16 * i);
    store(even + 8 * i, __builtin_convertvector(v & 255, Bytes));
    store(odd + 8 * i, __builtin_convertvector(v >> 8, Bytes));
  }
}

inline float scale_factor(const WeightView& w) {
  return w.format == Format::kQ4 && w.grid == Grid::kHalf ? 0.5f : 1.f;
}

template <bool q4>
void quantize_token_as(const LinearArgs& a, int64_t t, int64_t begin, int64_t end) {
  constexpr int64_t kCols = q4 ? 2 * kBytes : kBytes;
  const int64_t k = a.w.k;
  const int32_t offset = offset_of(a.w);
  const Layout at = token_layout(k);
  int8_t* q = reinterpret_cast<int8_t*>(a.scratch + t * at.bytes);
  int32_t* init = reinterpret_cast<int32_t*>(q + at.init);
  float* scale = reinterpret_cast<float*>(q + at.scale);
  for (int64_t c = begin; c < end; c += kSpan) {
    Span span;
    quantize_span(a.x + t * k + c, min64(kSpan, k - c), span);
    for (int b = 0; b < kSpan / kBlock; ++b) scale[c / kBlock + b] = span.scale[b] * scale_factor(a.w);
    if constexpr (q4) {
      for (int l = 0; l < kSpan / 8; ++l) init[c / 8 + l] = -offset * (span.sum[2 * l] + span.sum[2 * l + 1]);
      for (int64_t i = 0; i < kSpan; i += kBlock) {
        int8_t* even = q + (c + i) / kCols * kCols + (c + i) % kCols / 2;
        split_columns(span.q + i, even, even + kBytes);
      }
    } else {
      for (int l = 0; l < kSpan / 4; ++l) init[c / 4 + l] = -offset * span.sum[l];
      std::memcpy(q + c, span.q, kSpan);
    }
  }
}
void quantize_token(const LinearArgs& a, int64_t t, int64_t begin, int64_t end) {
  if (a.w.format == Format::kQ4)
    quantize_token_as<true>(a, t, begin, end);
  else
    quantize_token_as<false>(a, t, begin, end);
}

template <bool q4>
void quantize_tiles_as(const LinearArgs& a, int64_t begin, int64_t end) {
  const int64_t k = a.w.k;
  const int32_t offset = offset_of(a.w);
  const Layout at = tile_layout(k);
  for (int64_t tile = begin; tile < end; ++tile) {
    int32_t* q = reinterpret_cast<int32_t*>(a.scratch + tile * at.bytes);
    int32_t* init = reinterpret_cast<int32_t*>(a.scratch + tile * at.bytes + at.init);
    float* scale = reinterpret_cast<float*>(a.scratch + tile * at.bytes + at.scale);
    for (int64_t i = 0; i < kTile; ++i) {
      const int64_t t = tile * kTile + i;
      for (int64_t c = 0; c < k; c += kSpan) {
        Span span{};
        if (t < a.tokens) quantize_span(a.x + t * k + c, min64(kSpan, k - c), span);
        for (int b = 0; b < kSpan / kBlock; ++b) {
          int32_t total = 0;
          for (int l = 0; l < 8; ++l) total += span.sum[b * 8 + l];
          const int64_t to = (c / kBlock + b) * kTile + i;
          init[to] = -offset * total;
          scale[to] = span.scale[b] * scale_factor(a.w);
          int32_t unit[8];  // kQ4: the even columns of 8, then the odd ones
          if constexpr (q4) {
            int8_t even[16], odd[16];
            split_columns(span.q + b * kBlock, even, odd);
            for (int u = 0; u < 4; ++u)
              unit[2 * u] = load<int32_t>(even + 4 * u), unit[2 * u + 1] = load<int32_t>(odd + 4 * u);
          } else {
            std::memcpy(unit, span.q + b * kBlock, kBlock);
          }
          for (int u = 0; u < 8; ++u) q[(c / 4 + b * 8 + u) * kTile + i] = unit[u];
        }
      }
    }
  }
}
void quantize_tiles(const LinearArgs& a, int64_t begin, int64_t end) {
  if (a.w.format == Format::kQ4)
    quantize_tiles_as<true>(a, begin, end);
  else
    quantize_tiles_as<false>(a, begin, end);
}

}  // namespace
}  // namespace q4s
