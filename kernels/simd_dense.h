// Unquantised rows: decoding any format to f32 (the same bits at every level), and dot products of a few
// tokens with F32, F16 and BF16 rows read once from the mapped file.
#pragma once
#include "kernels/cpu_kernels.h"
#include "kernels/simd.h"

namespace q4s {
namespace {

inline const uint8_t* row_at(const WeightView& w, int64_t i, int64_t bytes) {
  return w.rows ? w.rows[i] : w.data + i * bytes;
}

template <Format f>
F load_as(const uint8_t* row, int64_t i) {
  if constexpr (f == Format::kF32) return load<F>(row + 4 * i);
  if constexpr (f == Format::kF16) return load_half(row + 2 * i);
  return load_bf16(row + 2 * i);
}
// Lanes [0, n) of the row's end; nothing is read beyond it.
template <Format f>
F load_as(const uint8_t* row, int64_t i, int64_t n) {
  constexpr int kBytes = f == Format::kF32 ? 4 : 2;
  uint8_t v[kBytes * kW] = {};
  std::memcpy(v, row + kBytes * i, size_t(kBytes * n));
  return load_as<f>(v, 0);
}

template <Format f>
void decode_floats(const uint8_t* row, int64_t k, float* y) {
  int64_t i = 0;
  for (; i + kW <= k; i += kW) store(y + i, load_as<f>(row, i));
  if (i < k) storef_n(y + i, load_as<f>(row, i, k - i), k - i);
}

// kW nibbles in column order from kW / 2 bytes, even columns low.
inline UnsignedBytes split_nibbles(const uint8_t* p) {
  typedef uint8_t Bytes __attribute__((vector_size(kW / 2)));
  typedef uint16_t Pairs __attribute__((vector_size(kW)));
  const Pairs v = __builtin_convertvector(load<Bytes>(p), Pairs);
  return UnsignedBytes((v & 15) | (v & 0xf0) << 4);
}

// y = scale * (code - offset) over columns [begin, end) of a kQ4 row.
inline void decode_q4_group(const uint8_t* row, int64_t begin, int64_t end, float scale, float offset,
                            float* y) {
  int64_t i = begin;
  if (begin % 2 == 0)
    for (; i + kW <= end; i += kW) store(y + i, scale * (to_float(split_nibbles(row + i / 2)) - offset));
  for (; i < end; ++i) y[i] = scale * (float(row[i / 2] >> (i % 2 * 4) & 15) - offset);
}
inline void decode_q8_group(const uint8_t* row, int64_t begin, int64_t end, float scale, float* y) {
  int64_t i = begin;
  for (; i + kW <= end; i += kW) store(y + i, scale * to_float(load<SignedBytes>(row + i)));
  for (; i < end; ++i) y[i] = scale * float(int8_t(row[i]));
}

// Blocks of 32: a header of one or two halves, then the codes. Byte i of a nibble block holds columns i, i
// + 16.
template <Format f>
void decode_gguf(const uint8_t* p, int64_t k, float* y) {
  constexpr int kHead = f == Format::kGgufQ4_1 ? 4 : 2;
  for (int64_t b = 0; b < k / 32; ++b, y += 32) {
    uint16_t head[2] = {};
    std::memcpy(head, p, kHead);
    p += kHead;
    const float d = half_value(head[0]);
    if constexpr (f == Format::kGgufQ8_0) {
      for (int i = 0; i < 32; i += kW) store(y + i, d * to_float(load<SignedBytes>(p + i)));
      p += 32;
    } else {
      const float m = f == Format::kGgufQ4_1 ? half_value(head[1]) : d * -8;
      for (int i = 0; i < 16; i += kW) {
        const UnsignedBytes c = load<UnsignedBytes>(p + i);
        store(y + i, d * to_float(c & 15) + m);
        store(y + 16 + i, d * to_float(c >> 4) + m);
      }
      p += 16;
    }
  }
}

void decode_row(const WeightView& w, int64_t n, float* y) {
  const int64_t k = w.k;
  switch (w.format) {
    case Format::kF32: std::memcpy(y, row_at(w, n, 4 * k), size_t(k) * 4); break;
    case Format::kF16: decode_floats<Format::kF16>(row_at(w, n, 2 * k), k, y); break;
    case Format::kBF16: decode_floats<Format::kBF16>(row_at(w, n, 2 * k), k, y); break;
    case Format::kQ4:
    case Format::kQ8: {
      const bool q4 = w.format == Format::kQ4;
      const int64_t groups = div_up(k, w.group);
      const uint8_t* row = row_at(w, n, q4 ? (k + 1) / 2 : k);
      for (int64_t g = 0; g < groups; ++g) {
        const float scale = half_value(w.scales[n * groups + g]);
        const int64_t begin = g * w.group, end = min64(k, begin + w.group);
        if (q4)
          decode_q4_group(row, begin, end, scale, w.grid == Grid::kInt ? 8.f : 7.5f, y);
        else
          decode_q8_group(row, begin, end, scale, y);
      }
      break;
    }
    case Format::kGgufQ8_0: decode_gguf<Format::kGgufQ8_0>(row_at(w, n, k / 32 * 34), k, y); break;
    case Format::kGgufQ4_0: decode_gguf<Format::kGgufQ4_0>(row_at(w, n, k / 32 * 18), k, y); break;
    case Format::kGgufQ4_1: decode_gguf<Format::kGgufQ4_1>(row_at(w, n, k / 32 * 20), k, y); break;
  }
}

// Tokens [t0, t0 + T) against one row r: several sums a token, so that the additions do not wait for each
// other.
template <Format f, int T>
void dot_row(const LinearArgs& a, const uint8_t* row, int64_t t0, int64_t r) {
  constexpr int kSums = T <= 2 ? 4 : 2;
  const int64_t k = a.w.k;
  const float* x = a.x + t0 * k;
  F acc[T][kSums] = {};
  int64_t i = 0;
  for (; i + kSums * kW <= k; i += kSums * kW)
    for (int s = 0; s < kSums; ++s) {
      const F w = load_as<f>(row, i + s * kW);
      for (int t = 0; t < T; ++t) acc[t][s] = fma(w, loadf(x + t * k + i + s * kW), acc[t][s]);
    }
  for (; i < k; i += kW) {
    const int64_t m = min64(kW, k - i);
    const F w = load_as<f>(row, i, m);
    for (int t = 0; t < T; ++t) acc[t][0] = fma(w, loadf_n(x + t * k + i, m), acc[t][0]);
  }
  for (int t = 0; t < T; ++t) {
    F total = acc[t][0];
    for (int s = 1; s < kSums; ++s) total += acc[t][s];
    const int64_t at = (t0 + t) * a.w.n + r;
    a.y[at] = (a.residual ? a.residual[at] : 0.f) + sum(total);
  }
}
template <Format f>
void dot_tokens(const LinearArgs& a, const uint8_t* row, int64_t r) {
  int64_t t = 0;
  for (; t + 4 <= a.tokens; t += 4) dot_row<f, 4>(a, row, t, r);
  switch (a.tokens - t) {
    case 1: return dot_row<f, 1>(a, row, t, r);
    case 2: return dot_row<f, 2>(a, row, t, r);
    case 3: return dot_row<f, 3>(a, row, t, r);
  }
}
void dot_rows(const LinearArgs& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) switch (a.w.format) {
      case Format::kF32: dot_tokens<Format::kF32>(a, row_at(a.w, r, 4 * a.w.k), r); break;
      case Format::kF16: dot_tokens<Format::kF16>(a, row_at(a.w, r, 2 * a.w.k), r); break;
      case Format::kBF16: dot_tokens<Format::kBF16>(a, row_at(a.w, r, 2 * a.w.k), r); break;
      default:  // unpacked to f32 first, where the row stays in the nearest cache
        decode_row(a.w, r, reinterpret_cast<float*>(a.scratch));
        dot_tokens<Format::kF32>(a, reinterpret_cast<const uint8_t*>(a.scratch), r);
    }
}

}  // namespace
}  // namespace q4s
