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

// ---- layouts ----

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

}  // namespace
}  // namespace q4s
