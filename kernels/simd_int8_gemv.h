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

// Codes are asked for in the order of memory, whatever rows are multiplied at a time: only then does the
// hardware stream, too, and a core's few requests in flight suffice. First into the second cache, then into
// the first.
constexpr int64_t kNear = 2048, kFar = 12288;  // bytes ahead

struct GemvShape {
  int64_t groups, bytes, vectors, whole;  // of a row; of its vectors, `whole` are full
  int64_t per_group;                      // vectors
  Layout at;
};

// Keeps a loaded vector in its register; where it is used twice, GCC would rather load it twice.
inline void once(B& v) {
#if defined(__AVX2__)
  asm("" : "+v"(v));
#else
  (void)v;
#endif
}

// n <= 16 halves to float; what lies behind them in y is left alone or set to 0.
inline void load_halves(const uint16_t* p, int64_t n, float* y) {
#if defined(__AVX512F__)
  store(y, load_half_n(p, n));
#else
  int64_t i = 0;
  for (; i + kW <= n; i += kW) store(y + i, load_half(p + i));
#if defined(__F16C__)
  if (i + 4 <= n) {
    _mm_storeu_ps(y + i, _mm_cvtph_ps(_mm_loadu_si64(p + i)));
    i += 4;
  }
#endif
  for (; i < n; ++i) y[i] = half_value(p[i]);
#endif
}

// R rows from r on, T tokens from t0 on. `per`: weight scales in one vector (group < its columns), else 1.
// span: vectors a group, 0 for any number.
template <bool q4, bool half, int per, int span, int T, int R>
void gemv_rows(const LinearArgs& a, const GemvShape& shape, int64_t t0, int64_t r) {
  constexpr int kCols = q4 ? 2 * kBytes : kBytes, kBlocks = kCols > kBlock ? kCols / kBlock : 1;
  constexpr int kQ = q4 ? 2 * kBytes : kBytes;  // activation bytes a vector
  const uint8_t* row[R];
  for (int i = 0; i < R; ++i) row[i] = row_at(a.w, r + i, shape.bytes);
  const int8_t* q[T];
  for (int t = 0; t < T; ++t) q[t] = reinterpret_cast<const int8_t*>(a.scratch + (t0 + t) * shape.at.bytes);

  // part += vector v of the rows times the tokens.
  const auto multiply = [&](int64_t v, auto whole, bool fetch, F(&part)[T][R])
      __attribute__((always_inline)) {
    B low[R], high[R];
    for (int i = 0; i < R; ++i) {
      const uint8_t* p = row[i] + v * kBytes;
      B codes = whole ? load<B>(p) : load_bytes(p, shape.bytes - v * kBytes);
      once(codes);
      if (fetch) {
        const uint8_t* line = row[0] + v * (kBytes * R) + i * 64;
        __builtin_prefetch(line + kNear, 0, 3);
        __builtin_prefetch(line + kFar, 0, 2);
      }
      low[i] = q4 ? low_codes<half>(codes) : q8_codes(codes);
      if (q4) high[i] = high_codes<half>(codes);
    }
    for (int t = 0; t < T; ++t) {
      const I init = load<I>(q[t] + shape.at.init + v * kBytes);
      const F s = spread<kBlocks>(reinterpret_cast<const float*>(q[t] + shape.at.scale) + v * kCols / kBlock);
      for (int i = 0; i < R; ++i) {
        I dot;
        if constexpr (q4)
          dot = dot_q4<half>(init, low[i], high[i], q[t] + v * kQ);
        else
          dot = dot_q8(init, low[i], q[t] + v * kQ);
        part[t][i] = fma(to_float(dot), s, part[t][i]);
      }
    }
  };
  constexpr std::true_type kWhole;
  constexpr std::false_type kTail;

  constexpr int64_t kScales = 16;  // converted to f32 at a time
  float scales[R][kScales];
  if (per > 1) std::memset(scales, 0, sizeof scales);
  const auto convert = [&](int64_t g) __attribute__((always_inline)) {  // from group g on
    for (int i = 0; i < R; ++i)
      load_halves(a.w.scales + (r + i) * shape.groups + g, min64(kScales, shape.groups - g), scales[i]);
  };
  F total[T][R] = {};
  // total += part times the scales from group g on. The last vector of a row may hold fewer groups than
  // `per`: the parts of absent ones are 0.
  const auto weigh = [&](int64_t g, const F(&part)[T][R]) __attribute__((always_inline)) {
    for (int i = 0; i < R; ++i) {
      const F s = spread<per>(&scales[i][g % kScales]);
      for (int t = 0; t < T; ++t) total[t][i] = fma(part[t][i], s, total[t][i]);
    }
  };
  int64_t v = 0, g = 0;
  if constexpr (span > 0)
    for (; v + span <= shape.whole; v += span, g += per) {
      if (g % kScales == 0) convert(g);
      F part[T][R] = {};
      for (int i = 0; i < span; ++i) multiply(v + i, kWhole, i * kBytes % 64 == 0, part);
      weigh(g, part);
    }
  for (; v < shape.vectors; g += per) {
    if (g % kScales == 0) convert(g);
    F part[T][R] = {};
    const int64_t last = min64(shape.vectors, v + shape.per_group);
    for (; v < min64(last, shape.whole); ++v) multiply(v, kWhole, true, part);
    for (; v < last; ++v) multiply(v, kTail, true, part);
    weigh(g, part);
  }
  for (int t = 0; t < T; ++t)
    for (int i = 0; i < R; ++i) {
      const int64_t y = (t0 + t) * a.w.n + r + i;
      a.y[y] = (a.residual ? a.residual[y] : 0.f) + sum(total[t][i]);
    }
}

template <bool q4, bool half, int per, int span, int T>
void gemv_tokens(const LinearArgs& a, const GemvShape& shape, int64_t t0, int64_t begin, int64_t end) {
  constexpr int kRows = kW == 16 || T == 1 ? 4 : 2;
  int64_t r = begin;
  // Long rows of one token by twos where the arithmetic has time to spare: nearer to the order of memory.
  if constexpr (kW == 16 && T == 1)
    if (shape.bytes >= 1024)
      for (; r + 2 <= end; r += 2) gemv_rows<q4, half, per, span, T, 2>(a, shape, t0, r);
  for (; r + kRows <= end; r += kRows) gemv_rows<q4, half, per, span, T, kRows>(a, shape, t0, r);
  for (; r < end; ++r) gemv_rows<q4, half, per, span, T, 1>(a, shape, t0, r);
}
template <bool q4, bool half, int per, int span>
void gemv_scaled(const LinearArgs& a, const GemvShape& shape, int64_t begin, int64_t end) {
  int64_t t = 0;
  for (; t + 4 <= a.tokens; t += 4) gemv_tokens<q4, half, per, span, 4>(a, shape, t, begin, end);
  switch (a.tokens - t) {
    case 1: return gemv_tokens<q4, half, per, span, 1>(a, shape, t, begin, end);
    case 2: return gemv_tokens<q4, half, per, span, 2>(a, shape, t, begin, end);
    case 3: return gemv_tokens<q4, half, per, span, 3>(a, shape, t, begin, end);
  }
}
template <bool q4, bool half>
void gemv_coded(const LinearArgs& a, int64_t begin, int64_t end) {
  constexpr int kCols = q4 ? 2 * kBytes : kBytes;
  const int64_t k = a.w.k, bytes = q4 ? (k + 1) / 2 : k;
  const int64_t group =
      a.w.group < k ? a.w.group : div_up(k, kCols) * kCols;  // a whole row: in whole vectors
  const GemvShape shape{.groups = div_up(k, a.w.group),
                        .bytes = bytes,
                        .vectors = div_up(k, kCols),
                        .whole = bytes / kBytes,
                        .per_group = div_up(group, kCols),
                        .at = token_layout(k)};
  if constexpr (kCols >= 128)
    if (group * 4 == kCols) return gemv_scaled<q4, half, 4, 1>(a, shape, begin, end);
  if constexpr (kCols >= 64)
    if (group * 2 == kCols) return gemv_scaled<q4, half, 2, 1>(a, shape, begin, end);
  switch (shape.per_group) {
    case 1: return gemv_scaled<q4, half, 1, 1>(a, shape, begin, end);
    case 2: return gemv_scaled<q4, half, 1, 2>(a, shape, begin, end);
  }
  gemv_scaled<q4, half, 1, 0>(a, shape, begin, end);
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
