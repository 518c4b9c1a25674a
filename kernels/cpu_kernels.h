// One table of fast kernels a CPU level; the operations' own files split the work and call through it. The
// three tables are the same source (simd_*.h) compiled for three instruction sets. A file compiled for a wide
// set must not emit inline functions that others share (the linker keeps one copy, perhaps the wide one):
// simd_*.h live in an unnamed namespace and call nothing inline from elsewhere.
#pragma once
#include "kernels/attention.h"
#include "kernels/cpu_features.h"
#include "kernels/linear.h"
#include "kernels/rms_norm.h"
#include "kernels/rope_kv.h"
#include "kernels/rotate.h"
#include "kernels/swiglu.h"

namespace q4s {

constexpr int64_t kMostFactor = 64;

// Ranges [begin, end) count what the name says. Nothing here allocates.
struct CpuKernels {
  // Row i of w as f32.
  void (*decode_row)(const WeightView& w, int64_t i, float* out);
  // Rows of y for a few tokens, straight from the stored type; a.scratch: one row in f32, used by all formats
  // but F32, F16 and BF16.
  void (*dot_rows)(const LinearArgs&, int64_t begin, int64_t end);

  // The other rows, unpacked by panels, for more tokens; layouts in simd_dense_gemm.h. `tile` as below.
  int64_t (*dense_tile_bytes)(int64_t k);
  int64_t (*dense_panel_bytes)(int64_t k);
  void (*pack_tiles)(const LinearArgs&, int64_t begin_tile, int64_t end_tile);
  void (*dense_gemm)(const LinearArgs&, int64_t begin, int64_t end, std::byte* panel);

  // kQ4, kQ8 on int8 activations; layouts in simd_int8.h. quantize (columns of one token, from a multiple of
  // 128 on) and gemv serve a few tokens; quantize_tiles and gemm many, `tile` at a time. The `bytes` are
  // multiples of 64.
  int tile;
  int64_t (*token_bytes)(int64_t k);
  int64_t (*tile_bytes)(int64_t k);
  int64_t (*panel_bytes)(const WeightView&);
  void (*quantize)(const LinearArgs&, int64_t token, int64_t begin, int64_t end);
  void (*quantize_tiles)(const LinearArgs&, int64_t begin_tile, int64_t end_tile);
  void (*gemv)(const LinearArgs&, int64_t begin, int64_t end);
  void (*gemm)(const LinearArgs&, int64_t begin, int64_t end, std::byte* panel);

  void (*rms_norm)(const RmsNormArgs&, int64_t begin_token, int64_t end_token);
  void (*swiglu)(const SwigluArgs&, int64_t token, int64_t begin, int64_t end);
  void (*rope_kv)(const RopeKvArgs&, int64_t begin_token, int64_t end_token);
  void (*rotate)(const RotateArgs&, int64_t begin_token, int64_t end_token);  // m <= kMostFactor
  // Heads [h0, h1) of one kv head: of one token, or of tokens [t0, t1), at most `queries` in all.
  int queries;
  int64_t (*attention_floats)(int64_t head_dim);  // scratch of one thread
  void (*attention_few)(const AttentionArgs&, int64_t t, int64_t h0, int64_t h1);
  void (*attention_many)(const AttentionArgs&, int64_t t0, int64_t t1, int64_t h0, int64_t h1,
                         float* scratch);
};

extern const CpuKernels kPortableKernels, kAvx2Kernels, kAvx512Kernels;
const CpuKernels& cpu_kernels();  // of cpu_level()

}  // namespace q4s
