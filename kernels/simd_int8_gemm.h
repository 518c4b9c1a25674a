// The matrix product of simd_int8.h: rows unpacked once into panels that all tokens use.
#pragma once
#include "kernels/simd_int8.h"

namespace q4s {
namespace {

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
