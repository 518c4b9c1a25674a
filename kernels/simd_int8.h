// kQ4 and kQ8 linears on int8 activations.
//
// Activations: per block of 32 columns, scale = max|x| / 127 and q = round(x / scale), int8. A product of a
// weight group g and a block b is  s_w[g] s_a[b] (sum q c - offset sum q): the sums are exact integers;
// `init` holds -offset * sum q, from which the sums start. For Grid::kHalf the codes count double (2c - 15)
// and s_a is halved. A non-finite x makes s_a non-finite, and so y.
//
// Vector product (few tokens), straight from the file's order: one vector of codes is 8 kW columns of kQ4
// (low nibbles even columns, high nibbles odd ones) or 4 kW of kQ8; lane l sums columns 8l.. (4l..).
// Activations of a token: q (a vector of even columns, then one of odd ones, and so on), init (one int32 a
// lane), scale (one a block).
//
// Matrix product (more tokens): kW rows side by side in the lanes. A unit is 4 columns; kQ4 units of 8
// columns are even, odd, even ... Weights of kW rows are unpacked into a panel (unit, row, 4 bytes) that all
// tokens use; activations of a tile of kTile tokens: q (unit, token, 4 bytes), init (block, token), scale
// (block, token).
#pragma once
#include <type_traits>

#include "kernels/cpu_kernels.h"
#include "kernels/simd.h"
#include "kernels/simd_dense.h"

namespace q4s {
namespace {

#if defined(__AVX512F__)
constexpr int kTile = 14;
constexpr bool kVnni = true;
#elif defined(__AVX2__)
constexpr int kTile = 6;
constexpr bool kVnni = false;
#else
constexpr int kTile = 4;
constexpr bool kVnni = false;
#endif
constexpr int kBytes = 4 * kW;       // of a vector
constexpr int64_t kBlock = 32;       // columns sharing an activation scale
constexpr int64_t kRowsAtOnce = 64;  // of the matrix product: a pass over the activations serves so many

// ---- integer products ----

// The first n bytes at p, the others 0.
inline B load_bytes(const uint8_t* p, int64_t n) {
#if defined(__AVX512F__)
  return B(_mm512_maskz_loadu_epi8(n >= 64 ? ~0ull : (1ull << n) - 1, p));
#else
  uint8_t v[kBytes] = {};
  std::memcpy(v, p, size_t(min64(n, kBytes)));
  return load<B>(v);
#endif
}

#if !defined(__AVX512F__)
// 16-bit sums of neighbouring byte products; |w| <= 15 leaves room to add 8 of them.
inline S pairs(B w, B a) {
#if defined(__AVX2__)
  return S(_mm256_maddubs_epi16(__m256i(w), __m256i(a)));
#else
  const S lw = S(w) << 8 >> 8, hw = S(w) >> 8, la = S(a) << 8 >> 8, ha = S(a) >> 8;
  return lw * la + hw * ha;
#endif
}
// The same with signed w, |w| <= 128, |a| <= 127: at most 2 * 128 * 127, which just fits.
inline S pairs_signed(B w, B a) {
#if defined(__AVX2__)
  return S(_mm256_maddubs_epi16(_mm256_abs_epi8(__m256i(w)), _mm256_sign_epi8(__m256i(a), __m256i(w))));
#else
  return pairs(w, a);
#endif
}
// 32-bit sums of neighbours, times `times`.
inline I widen(S v, int16_t times) {
#if defined(__AVX2__)
  return I(_mm256_madd_epi16(__m256i(v), _mm256_set1_epi16(times)));
#else
  return ((I(v) << 16 >> 16) + (I(v) >> 16)) * int32_t(times);
#endif
}
#endif

// What a code vector becomes before it is multiplied. With VNNI both formats are unsigned bytes.
template <bool half>
B low_codes(B v) {
  if constexpr (half && kVnni) return B(U(v) << 1 & 0x1e1e1e1e);
  return B(U(v) & 0x0f0f0f0f);
}
template <bool half>
B high_codes(B v) {
  if constexpr (half && kVnni) return B(U(v) >> 3 & 0x1e1e1e1e);
  return B(U(v) >> 4 & 0x0f0f0f0f);
}
inline B q8_codes(B v) { return kVnni ? B(U(v) ^ 0x80808080) : v; }

constexpr int32_t offset_of(const WeightView& w) {
  if (w.format == Format::kQ8) return kVnni ? 128 : 0;
  return w.grid == Grid::kHalf ? 15 : 8;
}

template <bool half>
I dot_q4(I init, B low, B high, const int8_t* q) {
#if defined(__AVX512F__)
  init = I(_mm512_dpbusd_epi32(__m512i(init), __m512i(low), __m512i(load<B>(q))));
  return I(_mm512_dpbusd_epi32(__m512i(init), __m512i(high), __m512i(load<B>(q + kBytes))));
#else
  return init + widen(pairs(low, load<B>(q)) + pairs(high, load<B>(q + kBytes)), half ? 2 : 1);
#endif
}
inline I dot_q8(I init, B codes, const int8_t* q) {
#if defined(__AVX512F__)
  return I(_mm512_dpbusd_epi32(__m512i(init), __m512i(codes), __m512i(load<B>(q))));
#else
  return init + widen(pairs_signed(codes, load<B>(q)), 1);
#endif
}

// Sums of 4 neighbouring bytes.
inline I sums_of_4(B v) {
#if defined(__AVX512F__)
  return I(_mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), __m512i(v)));
#else
  return widen(pairs(B(splat(0x01010101)), v), 1);
#endif
}

// The running sum of a block in the matrix product: 16-bit lanes where 8 products of 4-bit codes fit in them.
template <bool q4, bool half>
struct Sum {
#if defined(__AVX512F__)
  I v;
  void start(int32_t init) { v = splat(init); }
  void add(B w, int32_t a) { v = I(_mm512_dpbusd_epi32(__m512i(v), __m512i(w), __m512i(splat(a)))); }
  I result(int32_t) const { return v; }
#else
  using V = std::conditional_t<q4, S, I>;
  V v;
  void start(int32_t) { v = V{}; }
  void add(B w, int32_t a) {
    if constexpr (q4)
      v += pairs(w, B(splat(a)));
    else
      v += widen(pairs_signed(w, B(splat(a))), 1);
  }
  I result(int32_t init) const {
    if constexpr (q4)
      return widen(v, half ? 2 : 1) + init;
    else
      return v;
  }
#endif
};

// ---- activations ----

struct Layout {  // of one token, or of one tile, in the scratch
  int64_t init, scale, bytes;
};
constexpr int64_t padded(int64_t k) { return (k + 127) / 128 * 128; }
constexpr Layout token_layout(int64_t k) {
  const int64_t p = padded(k);
  return {p, 2 * p, (2 * p + p / 8 + 63) / 64 * 64};
}
constexpr Layout tile_layout(int64_t k) {
  const int64_t p = padded(k) * kTile;
  return {p, p + p / 8, (p + p / 4 + 63) / 64 * 64};
}

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
void quantize_tokens_as(const LinearArgs& a, int64_t begin, int64_t end) {
  constexpr int64_t kCols = q4 ? 2 * kBytes : kBytes;
  const int64_t k = a.w.k;
  const int32_t offset = offset_of(a.w);
  const Layout at = token_layout(k);
  for (int64_t t = begin; t < end; ++t) {
    int8_t* q = reinterpret_cast<int8_t*>(a.scratch + t * at.bytes);
    int32_t* init = reinterpret_cast<int32_t*>(q + at.init);
    float* scale = reinterpret_cast<float*>(q + at.scale);
    for (int64_t c = 0; c < k; c += kSpan) {
      Span span;
      quantize_span(a.x + t * k + c, min64(kSpan, k - c), span);
      for (int b = 0; b < kSpan / kBlock; ++b) scale[c / kBlock + b] = span.scale[b] * scale_factor(a.w);
      if constexpr (q4) {
        for (int l = 0; l < kSpan / 8; ++l)
          init[c / 8 + l] = -offset * (span.sum[2 * l] + span.sum[2 * l + 1]);
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
}
void quantize_tokens(const LinearArgs& a, int64_t begin, int64_t end) {
  if (a.w.format == Format::kQ4)
    quantize_tokens_as<true>(a, begin, end);
  else
    quantize_tokens_as<false>(a, begin, end);
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

// ---- vector product ----

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

// R rows from r on, T tokens from t0 on. `per`: weight scales in one vector (group < its columns), else 1.
template <bool q4, bool half, int per, int T, int R>
void gemv_rows(const LinearArgs& a, int64_t t0, int64_t r, int64_t prefetch_end) {
  constexpr int kCols = q4 ? 2 * kBytes : kBytes, kBlocks = kCols > kBlock ? kCols / kBlock : 1;
  constexpr int kQ = q4 ? 2 * kBytes : kBytes;  // activation bytes a vector
  const int64_t k = a.w.k, groups = div_up(k, a.w.group), bytes = q4 ? (k + 1) / 2 : k;
  const int64_t vectors = div_up(k, kCols), per_group = per > 1 ? 1 : div_up(min64(a.w.group, k), kCols);
  const Layout at = token_layout(k);
  const uint8_t *row[R], *next[R];
  const uint16_t* scale[R];
  for (int i = 0; i < R; ++i) {
    row[i] = row_at(a.w, r + i, bytes);
    next[i] = row_at(a.w, min64(r + R + i, prefetch_end - 1), bytes);
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
        __builtin_prefetch(next[i] + v * kBytes);
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
  for (; r + kRows <= end; r += kRows) gemv_rows<q4, half, per, T, kRows>(a, t0, r, end);
  for (; r < end; ++r) gemv_rows<q4, half, per, T, 1>(a, t0, r, end);
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

// ---- matrix product ----

// Rows [r, r + kW), those from `end` on as zeros, into panel (unit, row, 4 bytes).
template <bool q4, bool half>
void unpack_rows(const WeightView& w, int64_t r, int64_t end, B* panel) {
  const int64_t bytes = q4 ? (w.k + 1) / 2 : w.k;
  const uint8_t* row[kW];
  for (int i = 0; i < kW; ++i) row[i] = row_at(w, min64(r + i, end - 1), bytes);
  for (int64_t at = 0; at < bytes; at += kBytes) {
    F v[kW];
    for (int i = 0; i < kW; ++i)
      v[i] = F(at + kBytes <= bytes ? load<B>(row[i] + at) : load_bytes(row[i] + at, bytes - at));
    transpose(v);
    for (int i = 0; i < kW; ++i) {
      if constexpr (q4) {
        *panel++ = low_codes<half>(B(v[i]));
        *panel++ = high_codes<half>(B(v[i]));
      } else {
        *panel++ = q8_codes(B(v[i]));
      }
    }
  }
}

// kTile tokens times kW rows: out (token, row).
template <bool q4, bool half>
void multiply_tile(const LinearArgs& a, int64_t tile, const B* panel, const F* scales, F (&out)[kTile]) {
  const Layout at = tile_layout(a.w.k);
  const std::byte* base = a.scratch + tile * at.bytes;
  const int32_t* q = reinterpret_cast<const int32_t*>(base);
  const int32_t* init = reinterpret_cast<const int32_t*>(base + at.init);
  const float* scale = reinterpret_cast<const float*>(base + at.scale);
  const int64_t blocks = div_up(a.w.k, kBlock), per_group = div_up(min64(a.w.group, a.w.k), kBlock);
  for (F& o : out) o = F{};
  for (int64_t b = 0; b < blocks;) {
    F part[kTile] = {};
    for (const int64_t last = min64(blocks, b + per_group); b < last; ++b) {
      Sum<q4, half> acc[kTile];
      for (int t = 0; t < kTile; ++t) acc[t].start(init[t]);
      for (int u = 0; u < kBlock / 4; ++u, q += kTile) {
        const B w = *panel++;
        for (int t = 0; t < kTile; ++t) acc[t].add(w, q[t]);
      }
      for (int t = 0; t < kTile; ++t)
        part[t] = fma(to_float(acc[t].result(init[t])), splat(scale[t]), part[t]);
      init += kTile;
      scale += kTile;
    }
    for (int t = 0; t < kTile; ++t) out[t] = fma(part[t], *scales, out[t]);
    ++scales;
  }
}

template <bool q4, bool half>
void gemm_coded(const LinearArgs& a, int64_t begin, int64_t end, std::byte* scratch) {
  const int64_t n = a.w.n, groups = div_up(a.w.k, a.w.group), units = padded(a.w.k) / 4;
  B* panel = reinterpret_cast<B*>(scratch);
  F* scales = reinterpret_cast<F*>(panel + kRowsAtOnce / kW * units);
  for (int64_t r = begin; r < end; r += kRowsAtOnce) {
    const int64_t rows = min64(kRowsAtOnce, end - r), parts = div_up(rows, kW);
    for (int64_t p = 0; p < parts; ++p) {
      unpack_rows<q4, half>(a.w, r + p * kW, end, panel + p * units);
      for (int64_t g = 0; g < groups; ++g)
        for (int i = 0; i < kW; ++i)
          scales[p * groups + g][i] = half_value(a.w.scales[min64(r + p * kW + i, end - 1) * groups + g]);
    }
    for (int64_t tile = 0; tile < div_up(a.tokens, kTile); ++tile)
      for (int64_t p = 0; p < parts; ++p) {
        F out[kTile];
        multiply_tile<q4, half>(a, tile, panel + p * units, scales + p * groups, out);
        const int64_t first = r + p * kW, width = min64(kW, end - first);
        for (int64_t t = tile * kTile; t < min64(a.tokens, (tile + 1) * kTile); ++t) {
          const int64_t y = t * n + first;
          const F sum = out[t - tile * kTile];
          storef_n(a.y + y, a.residual ? loadf_n(a.residual + y, width) + sum : sum, width);
        }
      }
  }
}
void gemm(const LinearArgs& a, int64_t begin, int64_t end, std::byte* scratch) {
  if (a.w.format == Format::kQ8)
    gemm_coded<false, false>(a, begin, end, scratch);
  else if (a.w.grid == Grid::kHalf)
    gemm_coded<true, true>(a, begin, end, scratch);
  else
    gemm_coded<true, false>(a, begin, end, scratch);
}

int64_t tile_bytes(int64_t k) { return tile_layout(k).bytes; }
int64_t token_bytes(int64_t k) { return token_layout(k).bytes; }
int64_t panel_bytes(const WeightView& w) { return kRowsAtOnce * (padded(w.k) + div_up(w.k, w.group) * 4); }

}  // namespace
}  // namespace q4s
