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

// y = scale * (code - offset) over columns [begin, end) of a kQ4 row.
inline void decode_q4_group(const uint8_t* row, int64_t begin, int64_t end, float scale, float offset,
                            float* y) {
  for (int64_t i = begin; i < end; ++i) y[i] = scale * (float(row[i / 2] >> (i % 2 * 4) & 15) - offset);
}
inline void decode_q8_group(const uint8_t* row, int64_t begin, int64_t end, float scale, float* y) {
  for (int64_t i = begin; i < end; ++i) y[i] = scale * float(int8_t(row[i]));
}

// Blocks of 32: a header of one or two halves, then the codes. Byte i of a nibble block holds columns i, i
// + 16.
template <Format f>
void decode_gguf(const uint8_t* p, int64_t k, float* y) {
  for (int64_t b = 0; b < k / 32; ++b, y += 32) {
    uint16_t head[2];
    std::memcpy(head, p, 4);
    const float d = half_value(head[0]);
    if constexpr (f == Format::kGgufQ8_0) {
      for (int i = 0; i < 32; ++i) y[i] = d * float(int8_t(p[2 + i]));
      p += 34;
    } else {
      const float m = f == Format::kGgufQ4_1 ? half_value(head[1]) : d * -8;
      p += f == Format::kGgufQ4_1 ? 4 : 2;
      for (int i = 0; i < 16; ++i) {
        y[i] = d * float(p[i] & 15) + m;
        y[i + 16] = d * float(p[i] >> 4) + m;
      }
      p += 16;
    }
  }
}

void decode_row(const WeightView& w, int64_t n, float* y) {
  const int64_t k = w.k;
  switch (w.format) {
    case Format::kF32:
      std::memcpy(y, row_at(w, n, 4 * k), size_t(k) * 4);
      break;
    case Format::kF16:
      decode_floats<Format::kF16>(row_at(w, n, 2 * k), k, y);
      break;
    case Format::kBF16:
      decode_floats<Format::kBF16>(row_at(w, n, 2 * k), k, y);
      break;
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
    case Format::kGgufQ8_0:
      decode_gguf<Format::kGgufQ8_0>(row_at(w, n, k / 32 * 34), k, y);
      break;
    case Format::kGgufQ4_0:
      decode_gguf<Format::kGgufQ4_0>(row_at(w, n, k / 32 * 18), k, y);
      break;
    case Format::kGgufQ4_1:
      decode_gguf<Format::kGgufQ4_1>(row_at(w, n, k / 32 * 20), k, y);
      break;
  }
}

// T tokens against rows [begin, end): 4 sums a token, so that the additions do not wait for each other.
template <Format f, int T>
void dot_rows_of(const LinearArgs& a, int64_t t0, int64_t begin, int64_t end) {
  constexpr int kBytes = f == Format::kF32 ? 4 : 2, kSums = T <= 2 ? 4 : 2;
  const int64_t k = a.w.k, n = a.w.n;
  const float* x = a.x + t0 * k;
  for (int64_t r = begin; r < end; ++r) {
    const uint8_t* row = row_at(a.w, r, kBytes * k);
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
      const int64_t at = (t0 + t) * n + r;
      a.y[at] = (a.residual ? a.residual[at] : 0.f) + sum(total);
    }
  }
}
template <Format f>
void dot_rows_as(const LinearArgs& a, int64_t begin, int64_t end) {
  int64_t t = 0;
  for (; t + 4 <= a.tokens; t += 4) dot_rows_of<f, 4>(a, t, begin, end);
  switch (a.tokens - t) {
    case 1:
      return dot_rows_of<f, 1>(a, t, begin, end);
    case 2:
      return dot_rows_of<f, 2>(a, t, begin, end);
    case 3:
      return dot_rows_of<f, 3>(a, t, begin, end);
  }
}
void dot_rows(const LinearArgs& a, int64_t begin, int64_t end) {
  switch (a.w.format) {
    case Format::kF32:
      return dot_rows_as<Format::kF32>(a, begin, end);
    case Format::kF16:
      return dot_rows_as<Format::kF16>(a, begin, end);
    default:
      return dot_rows_as<Format::kBF16>(a, begin, end);
  }
}

}  // namespace
}  // namespace q4s
