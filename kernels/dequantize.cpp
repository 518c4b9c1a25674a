// Every storage format to f32: one row decoder per format. What it yields is the value that all other paths
// compute with.
#include <cstring>

#include "kernels/half.h"
#include "kernels/linear.h"

namespace q4s {
namespace {

uint16_t read16(const uint8_t* p) {  // rows of a mapped file need not be aligned
  uint16_t v;
  std::memcpy(&v, p, 2);
  return v;
}

void decode_q4(const WeightView& w, const uint8_t* row, const uint16_t* scales, float* y) {
  const float offset = w.grid == Grid::kInt ? 8.f : 7.5f;
  for (int64_t i = 0; i < w.k; ++i)
    y[i] = half_to_float(scales[i / w.group]) * (float(row[i / 2] >> (i % 2 * 4) & 15) - offset);
}

// Blocks of 32: a header of one or two halves, then the codes. Byte i of a nibble block holds columns i, i
// + 16.
void decode_gguf(Format f, int64_t k, const uint8_t* p, float* y) {
  for (int64_t b = 0; b < k / 32; ++b, y += 32) {
    const float d = half_to_float(read16(p));
    p += 2;
    if (f == Format::kGgufQ8_0) {
      for (int i = 0; i < 32; ++i) y[i] = d * float(int8_t(p[i]));
      p += 32;
      continue;
    }
    float m = d * -8;
    if (f == Format::kGgufQ4_1) {
      m = half_to_float(read16(p));
      p += 2;
    }
    for (int i = 0; i < 16; ++i) {
      y[i] = d * float(p[i] & 15) + m;
      y[i + 16] = d * float(p[i] >> 4) + m;
    }
    p += 16;
  }
}

}  // namespace

void dequantize_rows(const WeightView& w, int64_t begin, int64_t end, float* out) {
  for (int64_t n = begin; n < end; ++n, out += w.k) {
    const uint8_t* row = w.row(n);
    switch (w.format) {
      case Format::kF32:
        std::memcpy(out, row, size_t(w.k) * 4);
        break;
      case Format::kF16:
        for (int64_t i = 0; i < w.k; ++i) out[i] = half_to_float(read16(row + 2 * i));
        break;
      case Format::kBF16:
        for (int64_t i = 0; i < w.k; ++i) out[i] = bf16_to_float(read16(row + 2 * i));
        break;
      case Format::kQ8: {
        const uint16_t* scales = w.scales + n * w.groups();
        for (int64_t i = 0; i < w.k; ++i) out[i] = half_to_float(scales[i / w.group]) * float(int8_t(row[i]));
        break;
      }
      case Format::kQ4:
        decode_q4(w, row, w.scales + n * w.groups(), out);
        break;
      case Format::kGgufQ8_0:
      case Format::kGgufQ4_0:
      case Format::kGgufQ4_1:
        decode_gguf(w.format, w.k, row, out);
        break;
    }
  }
}

}  // namespace q4s
