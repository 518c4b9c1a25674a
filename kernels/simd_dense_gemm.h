// The matrix product of unquantised rows in f32, any format: rows are unpacked once into panels that all
// tokens use. Every sum runs over its columns in order, by spans of kDepth, so that neither the number of
// threads nor that of tokens shows in it.
//
// Activations, laid out by pack_tiles: tiles of kTile tokens, (column, token) f32; absent tokens are zeros.
// Panel: kPanelRows rows as strips of 2 kW, each (column, row) f32; absent rows are zeros.
#pragma once
#include "kernels/simd_dense.h"
#include "kernels/simd_int8.h"

namespace q4s {
namespace {

constexpr int64_t kStrip = 2 * kW;  // rows; times kTile tokens: what the registers hold
constexpr int64_t kPanelRows = 64;  // a pass over the activations serves so many
constexpr int64_t kDepth = 1024;    // columns of a panel that stay in the second cache meanwhile

int64_t dense_tile_bytes(int64_t k) { return div_up(k * kTile * 4, 64) * 64; }
// Strips, then the rows that are being unpacked.
int64_t dense_panel_bytes(int64_t k) { return (kPanelRows * k + kW * div_up(k, 16) * 16) * 4; }

void pack_tiles(const LinearArgs& a, int64_t begin, int64_t end) {
  const int64_t k = a.w.k;
  for (int64_t tile = begin; tile < end; ++tile) {
    float* to = reinterpret_cast<float*>(a.scratch + tile * dense_tile_bytes(k));
    const int64_t count = min64(kTile, a.tokens - tile * kTile);
    for (int64_t t = 0; t < kTile; ++t) {
      const float* x = a.x + (tile * kTile + t) * k;
      for (int64_t j = 0; j < k; ++j) to[j * kTile + t] = t < count ? x[j] : 0.f;
    }
  }
}

// Rows [r, r + kStrip), those from `end` on as zeros, into a strip.
inline void unpack_strip(const WeightView& w, int64_t r, int64_t end, float* rows, float* strip) {
  const int64_t k = w.k, stride = div_up(k, 16) * 16;
  for (int64_t half = 0; half < kStrip; half += kW) {
    for (int64_t i = 0; i < kW; ++i)
      if (r + half + i < end) decode_row(w, r + half + i, rows + i * stride);
    for (int64_t j = 0; j < k; j += kW) {
      const int64_t width = min64(kW, k - j);
      F v[kW] = {};
      for (int64_t i = 0; i < kW; ++i)
        if (r + half + i < end) v[i] = loadf_n(rows + i * stride + j, width);
      transpose(v);
      for (int64_t i = 0; i < width; ++i) store(strip + (j + i) * kStrip + half, v[i]);
    }
  }
}

// out (token, row) = x (n columns, the first M of kTile tokens) times w (n columns, kStrip). Not inlined: the
// sums need nearly all registers.
template <int M>
__attribute__((noinline)) void multiply_strip(const float* x, const float* w, int64_t n, F (&out)[kTile][2]) {
  F sum[M][2] = {};
  for (int64_t j = 0; j < n; ++j, x += kTile, w += kStrip) {
    const F low = loadf(w), high = loadf(w + kW);
    for (int t = 0; t < M; ++t) {
      const F v = splat(x[t]);
      sum[t][0] = fma(v, low, sum[t][0]);
      sum[t][1] = fma(v, high, sum[t][1]);
    }
  }
  for (int t = 0; t < M; ++t) out[t][0] = sum[t][0], out[t][1] = sum[t][1];
}
// The same of `count` tokens, and perhaps one more.
template <int M = kTile>
void multiply_strip_of(int64_t count, const float* x, const float* w, int64_t n, F (&out)[kTile][2]) {
  if constexpr (M > 2)
    if (count <= M - 2) return multiply_strip_of<M - 2>(count, x, w, n, out);
  multiply_strip<M>(x, w, n, out);
}

// Rows [begin, end) of all tokens.
void dense_gemm_rows(const LinearArgs& a, int64_t begin, int64_t end, std::byte* scratch) {
  const int64_t n = a.w.n, k = a.w.k;
  float* panel = reinterpret_cast<float*>(scratch);
  float* rows = panel + kPanelRows * k;
  for (int64_t r = begin; r < end; r += kPanelRows) {
    const int64_t strips = div_up(min64(kPanelRows, end - r), kStrip);
    for (int64_t s = 0; s < strips; ++s) unpack_strip(a.w, r + s * kStrip, end, rows, panel + s * kStrip * k);
    for (int64_t from = 0; from < k; from += kDepth) {
      const float* before = from ? a.y : a.residual;
      for (int64_t tile = 0; tile < div_up(a.tokens, kTile); ++tile) {
        const float* x =
            reinterpret_cast<const float*>(a.scratch + tile * dense_tile_bytes(k)) + from * kTile;
        const int64_t count = min64(kTile, a.tokens - tile * kTile);
        for (int64_t s = 0; s < strips; ++s) {
          F out[kTile][2];
          multiply_strip_of(count, x, panel + s * kStrip * k + from * kStrip, min64(kDepth, k - from), out);
          const int64_t first = r + s * kStrip;
          for (int64_t t = 0; t < count; ++t)
            for (int half = 0; half < 2; ++half) {
              const int64_t width = clamp64(end - first - half * kW, 0, kW);
              const int64_t at = (tile * kTile + t) * n + first + half * kW;
              storef_n(a.y + at, before ? loadf_n(before + at, width) + out[t][half] : out[t][half], width);
            }
        }
      }
    }
  }
}

}  // namespace
}  // namespace q4s
