// The vector product of simd_int8.h: a few tokens with rows straight from the file's order.
#pragma once
#include "kernels/simd_int8.h"

namespace q4s {
namespace {

// `parts` floats, each spread over kW / parts lanes.
template <int parts>
F spread(const float* p) {
  if constexpr (parts == 1) return splat(*p);
#if defined(__AVX512F__)
  if constexpr (parts == 2) {
    const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    return F(_mm512_permutexvar_ps(lanes, _mm512_castps128_ps512(_mm_castsi128_ps(_mm_loadu_si64(p)))));
  }
  if constexpr (parts == 4) {
    const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return F(_mm512_permutexvar_ps(lanes, _mm512_castps128_ps512(_mm_loadu_ps(p))));
  }
#elif defined(__AVX2__)
  if constexpr (parts == 2) {
    const __m256i lanes = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
    return F(_mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_castsi128_ps(_mm_loadu_si64(p))), lanes));
  }
#endif
}

// Codes are fetched this far ahead, into the second cache: the first has too few lines in flight to hide the
// memory behind four rows at a time, and the hardware does not follow rows this short.
constexpr int64_t kAhead = 8192;

// R rows from r on, T tokens from t0 on. `per`: weight scales in one vector (group < its columns), else 1.
template <bool q4, bool half, int per, int T, int R>
void gemv_rows(const LinearArgs& a, int64_t t0, int64_t r) {
  constexpr int kCols = q4 ? 2 * kBytes : kBytes, kBlocks = kCols > kBlock ? kCols / kBlock : 1;
  constexpr int kQ = q4 ? 2 * kBytes : kBytes;  // activation bytes a vector
  const int64_t k = a.w.k, groups = div_up(k, a.w.group), bytes = q4 ? (k + 1) / 2 : k;
  const int64_t vectors = div_up(k, kCols), per_group = per > 1 ? 1 : div_up(min64(a.w.group, k), kCols);
  const Layout at = token_layout(k);
  const uint8_t* row[R];
  const uint16_t* scale[R];
  for (int i = 0; i < R; ++i) {
    row[i] = row_at(a.w, r + i, bytes);
    scale[i] = a.w.scales + (r + i) * groups;
  }
  const int8_t* q[T];
  for (int t = 0; t < T; ++t) q[t] = reinterpret_cast<const int8_t*>(a.scratch + (t0 + t) * at.bytes);

  constexpr int kScales = 16;  // converted to f32 at a time
  float scales[R][kScales];
  F total[T][R] = {};
  for (int64_t first = 0, g = 0; first < vectors; first += per_group, g += per) {
    if (g % kScales == 0)
      for (int i = 0; i < R; ++i)
        for (int64_t j = 0; j < kScales; j += kW)
          store(&scales[i][j], load_half_n(scale[i] + g + j, clamp64(groups - g - j, 0, kW)));
    F part[T][R] = {};
    const int64_t last = min64(vectors, first + per_group);
    for (int64_t v = first; v < last; ++v) {
      const int64_t left = bytes - v * kBytes;
      B low[R], high[R];
      for (int i = 0; i < R; ++i) {
        const uint8_t* p = row[i] + v * kBytes;
        const B codes = left >= kBytes ? load<B>(p) : load_bytes(p, left);
        __builtin_prefetch(p + kAhead, 0, 2);
        low[i] = q4 ? low_codes<half>(codes) : q8_codes(codes);
        if (q4) high[i] = high_codes<half>(codes);
      }
      for (int t = 0; t < T; ++t) {
        const I init = load<I>(q[t] + at.init + v * kBytes);
        const F s = spread<kBlocks>(reinterpret_cast<const float*>(q[t] + at.scale) + v * kCols / kBlock);
        for (int i = 0; i < R; ++i) {
          I dot;
          if constexpr (q4)
            dot = dot_q4<half>(init, low[i], high[i], q[t] + v * kQ);
          else
            dot = dot_q8(init, low[i], q[t] + v * kQ);
          part[t][i] = fma(to_float(dot), s, part[t][i]);
        }
      }
    }
    for (int i = 0; i < R; ++i) {
      // The last vector of a row may hold fewer groups than `per`: absent scales are 0.
      const F s = spread<per>(&scales[i][g % kScales]);
      for (int t = 0; t < T; ++t) total[t][i] = fma(part[t][i], s, total[t][i]);
    }
  }
  for (int t = 0; t < T; ++t)
    for (int i = 0; i < R; ++i) {
      const int64_t y = (t0 + t) * a.w.n + r + i;
      a.y[y] = (a.residual ? a.residual[y] : 0.f) + sum(total[t][i]);
    }
}

template <bool q4, bool half, int per, int T>
void gemv_tokens(const LinearArgs& a, int64_t t0, int64_t begin, int64_t end) {
  constexpr int kRows = kW == 16 || T == 1 ? 4 : 2;
  int64_t r = begin;
  for (; r + kRows <= end; r += kRows) gemv_rows<q4, half, per, T, kRows>(a, t0, r);
  for (; r < end; ++r) gemv_rows<q4, half, per, T, 1>(a, t0, r);
}
template <bool q4, bool half, int per>
void gemv_scaled(const LinearArgs& a, int64_t begin, int64_t end) {
  int64_t t = 0;
  for (; t + 4 <= a.tokens; t += 4) gemv_tokens<q4, half, per, 4>(a, t, begin, end);
  switch (a.tokens - t) {
    case 1:
      return gemv_tokens<q4, half, per, 1>(a, t, begin, end);
    case 2:
      return gemv_tokens<q4, half, per, 2>(a, t, begin, end);
    case 3:
      return gemv_tokens<q4, half, per, 3>(a, t, begin, end);
  }
}
template <bool q4, bool half>
void gemv_coded(const LinearArgs& a, int64_t begin, int64_t end) {
  constexpr int kCols = q4 ? 2 * kBytes : kBytes;
  const int64_t group = a.w.group < a.w.k ? a.w.group : kCols;
  if constexpr (kCols >= 128)
    if (group * 4 == kCols) return gemv_scaled<q4, half, 4>(a, begin, end);
  if constexpr (kCols >= 64)
    if (group * 2 == kCols) return gemv_scaled<q4, half, 2>(a, begin, end);
  gemv_scaled<q4, half, 1>(a, begin, end);
}
void gemv(const LinearArgs& a, int64_t begin, int64_t end) {
  if (a.w.format == Format::kQ8)
    gemv_coded<false, false>(a, begin, end);
  else if (a.w.grid == Grid::kHalf)
    gemv_coded<true, true>(a, begin, end);
  else
    gemv_coded<true, false>(a, begin, end);
}

}  // namespace
}  // namespace q4s
