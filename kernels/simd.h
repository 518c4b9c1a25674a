// The vector vocabulary of the fast CPU kernels: one width an instruction set, plain operators (GCC vector
// types) plus the few operations that need an instruction of their own. Included by cpu_level_*.cpp only,
// which are compiled with different flags; see cpu_kernels.h for the rule that keeps them apart.
#pragma once
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of its own _mm512_undefined_*()
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <cstdint>
#include <cstring>

namespace q4s {
namespace {

#if defined(__AVX512F__)
constexpr int kW = 16;  // 32-bit lanes
#elif defined(__AVX2__)
constexpr int kW = 8;
#else
constexpr int kW = 4;
#endif

typedef float F __attribute__((vector_size(4 * kW)));
typedef int32_t I __attribute__((vector_size(4 * kW)));
typedef uint32_t U __attribute__((vector_size(4 * kW)));
typedef int16_t S __attribute__((vector_size(4 * kW)));
typedef int8_t B __attribute__((vector_size(4 * kW)));

constexpr int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t clamp64(int64_t v, int64_t low, int64_t high) {
  return v < low ? low : v > high ? high : v;
}

template <typename V, typename T>
V load(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <typename V, typename T>
void store(T* p, V v) {
  std::memcpy(p, &v, sizeof v);
}
inline F loadf(const float* p) { return load<F>(p); }
inline F splat(float v) {
#if defined(__AVX512F__)
  return F(_mm512_set1_ps(v));
#elif defined(__AVX2__)
  return F(_mm256_set1_ps(v));
#else
  return F{v, v, v, v};
#endif
}
inline I splat(int32_t v) {
#if defined(__AVX512F__)
  return I(_mm512_set1_epi32(v));
#elif defined(__AVX2__)
  return I(_mm256_set1_epi32(v));
#else
  return I{v, v, v, v};
#endif
}

// The first n (0..kW) lanes, the others 0.
inline F loadf_n(const float* p, int64_t n) {
#if defined(__AVX512F__)
  return F(_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p));
#else
  float v[kW] = {};
  for (int64_t i = 0; i < n; ++i) v[i] = p[i];
  return loadf(v);
#endif
}
inline void storef_n(float* p, F x, int64_t n) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), __m512(x));
#else
  float v[kW];
  store(v, x);
  for (int64_t i = 0; i < n; ++i) p[i] = v[i];
#endif
}

inline F fma(F a, F b, F c) {
#if defined(__AVX512F__)
  return F(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
#elif defined(__FMA__)
  return F(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
#else
  return a * b + c;
#endif
}
inline F to_float(I v) { return __builtin_convertvector(v, F); }

// kW bytes and back. What GCC 12 makes of one long conversion is a loop over lanes.
typedef uint8_t UnsignedBytes __attribute__((vector_size(kW)));
typedef int8_t SignedBytes __attribute__((vector_size(kW)));
inline F to_float(UnsignedBytes c) {
#if defined(__AVX512F__)
  return to_float(I(_mm512_cvtepu8_epi32(__m128i(c))));
#elif defined(__AVX2__)
  return to_float(I(_mm256_cvtepu8_epi32(_mm_loadu_si64(&c))));
#else
  typedef uint16_t Wider __attribute__((vector_size(2 * kW)));
  return to_float(__builtin_convertvector(__builtin_convertvector(c, Wider), I));
#endif
}
inline F to_float(SignedBytes c) {
#if defined(__AVX512F__)
  return to_float(I(_mm512_cvtepi8_epi32(__m128i(c))));
#elif defined(__AVX2__)
  return to_float(I(_mm256_cvtepi8_epi32(_mm_loadu_si64(&c))));
#else
  typedef int16_t Wider __attribute__((vector_size(2 * kW)));
  return to_float(__builtin_convertvector(__builtin_convertvector(c, Wider), I));
#endif
}
inline SignedBytes narrow(I v) {
  typedef int16_t Wider __attribute__((vector_size(2 * kW)));
  return __builtin_convertvector(__builtin_convertvector(v, Wider), SignedBytes);
}

inline F max(F a, F b) {
#if defined(__AVX512F__)
  return F(_mm512_max_ps(__m512(a), __m512(b)));
#elif defined(__AVX2__)
  return F(_mm256_max_ps(__m256(a), __m256(b)));
#else
  return a > b ? a : b;
#endif
}
inline float sum(F v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(__m512(v));
#elif defined(__AVX2__)
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(__m256(v)), _mm256_extractf128_ps(__m256(v), 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}
inline float max_of(F v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(__m512(v));
#else
  float top = v[0];
  for (int i = 1; i < kW; ++i) top = v[i] > top ? v[i] : top;
  return top;
#endif
}

inline U max(U a, U b) { return a > b ? a : b; }
inline uint32_t max_of(U v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epu32(__m512i(v));
#elif defined(__AVX2__)
  __m128i m = _mm_max_epu32(_mm256_castsi256_si128(__m256i(v)), _mm256_extracti128_si256(__m256i(v), 1));
  m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4e));
  return uint32_t(_mm_cvtsi128_si32(_mm_max_epu32(m, _mm_shuffle_epi32(m, 0xb1))));
#else
  const uint32_t a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
  return a > b ? a : b;
#endif
}

// kW halves or bfloat16s to float, exactly.
inline F load_half(const void* p) {
#if defined(__AVX512F__)
  return F(_mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i_u*>(p))));
#elif defined(__F16C__)
  return F(_mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i_u*>(p))));
#else
  typedef uint16_t H __attribute__((vector_size(2 * kW)));
  const U h = __builtin_convertvector(load<H>(p), U), a = (h & 0x7fff) << 13;
  const U value = U(F(a) * 0x1p112f), special = value | 0x7f800000;  // infinity and NaN keep their mantissa
  return F((a >= 0x0f800000 ? special : value) | (h & 0x8000) << 16);
#endif
}
// The first n (0..kW), the others 0.
inline F load_half_n(const uint16_t* p, int64_t n) {
#if defined(__AVX512F__)
  return F(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p)));
#else
  if (n == kW) return load_half(p);
  uint16_t v[kW] = {};
  for (int64_t i = 0; i < n; ++i) v[i] = p[i];
  return load_half(v);
#endif
}
inline F load_bf16(const void* p) {
  typedef uint16_t H __attribute__((vector_size(2 * kW)));
  return F(__builtin_convertvector(load<H>(p), U) << 16);
}
inline float half_value(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  return load_half_n(&h, 1)[0];
#endif
}
// kW floats to halves, nearest even.
inline void store_half(uint16_t* p, F v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i_u*>(p), _mm512_cvtps_ph(__m512(v), 0));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i_u*>(p), _mm256_cvtps_ph(__m256(v), 0));
#else
  const U x = U(v), s = x >> 16 & 0x8000, a = x & 0x7fffffff;
  const U small = U(F(a) + 0.5f) - 0x3f000000;  // the adder rounds at 2^-24
  const U normal = (a + 0xfff + (a >> 13 & 1) - 0x38000000) >> 13;
  U h = a < 0x38800000 ? small : normal;
  h = a >= 0x477ff000 ? U{} + 0x7c00 : h;
  h = a > 0x7f800000 ? U{} + 0x7e00 : h;
  h |= s;
  for (int i = 0; i < kW; ++i) p[i] = uint16_t(h[i]);
#endif
}

// e^x for x <= 88.7; 0 below -87.3 (where it would leave the normal range).
// x = n ln2 + r, |r| <= 0.3466: the degree-7 Taylor polynomial is off by r^8/8! < 5.2e-9 relative.
inline F exp(F x) {
  constexpr float kMagic = 12582912;  // 1.5 * 2^23: adding it rounds to an integer
  const F shifted = fma(x, splat(1.44269504f), splat(kMagic)), n = shifted - kMagic;
  F r = fma(n, splat(-0.693359375f), x);  // ln2 in two parts: the first has 9 bits, so n times it is exact
  r = fma(n, splat(2.12194440e-4f), r);
  F p = splat(1 / 5040.f);
  p = fma(p, r, splat(1 / 720.f));
  p = fma(p, r, splat(1 / 120.f));
  p = fma(p, r, splat(1 / 24.f));
  p = fma(p, r, splat(1 / 6.f));
  p = fma(p, r, splat(0.5f));
  p = fma(p, r, splat(1.f));
  p = fma(p, r, splat(1.f));
  const F y = p * F((U(shifted) << 23) + 0x3f800000);  // times 2^n; a NaN stays one
  return x < -87.3f ? F{} : y;
}

// Interleaves the lower (upper) halves of a and b: a0 b0 a1 b1 ...
#if defined(__AVX512F__)
inline F zip_low(F a, F b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
inline F zip_high(F a, F b) {
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
#elif defined(__AVX2__)
inline F zip_low(F a, F b) { return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
inline F zip_high(F a, F b) { return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
#else
inline F zip_low(F a, F b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
inline F zip_high(F a, F b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
#endif

// v as a kW x kW matrix, transposed: log2(kW) perfect shuffles.
inline void transpose(F (&v)[kW]) {
  for (int round = 1; round < kW; round *= 2) {
    F w[kW];
    for (int i = 0; i < kW / 2; ++i) {
      w[2 * i] = zip_low(v[i], v[i + kW / 2]);
      w[2 * i + 1] = zip_high(v[i], v[i + kW / 2]);
    }
    for (int i = 0; i < kW; ++i) v[i] = w[i];
  }
}
// Lane i of the result: sum of v[i].
inline F sums(F (&v)[kW]) {
  for (int n = kW / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) v[i] = zip_low(v[i], v[i + n]) + zip_high(v[i], v[i + n]);
  return v[0];
}

}  // namespace
}  // namespace q4s
