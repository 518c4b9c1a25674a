// The table of cpu_kernels.h over the fast kernels. Each cpu_level_X.cpp includes it and is compiled for its
// own instruction set: everything here has internal linkage.
#pragma once
#include "kernels/simd_attention.h"
#include "kernels/simd_dense_gemm.h"
#include "kernels/simd_float.h"
#include "kernels/simd_int8_gemm.h"
#include "kernels/simd_int8_gemv.h"
#include "kernels/simd_int8_quantize.h"

namespace q4s {
namespace {

constexpr CpuKernels kKernels = {
    .decode_row = decode_row,
    .dot_rows = dot_rows,
    .dense_tile_bytes = dense_tile_bytes,
    .dense_panel_bytes = dense_panel_bytes,
    .pack_tiles = pack_tiles,
    .dense_gemm = dense_gemm_rows,
    .tile = kTile,
    .token_bytes = token_bytes,
    .tile_bytes = tile_bytes,
    .panel_bytes = panel_bytes,
    .quantize = quantize_token,
    .quantize_tiles = quantize_tiles,
    .gemv = gemv,
    .gemm = gemm,
    .rms_norm = rms_norm_tokens,
    .swiglu = swiglu_columns,
    .rope_kv = rope_kv_tokens,
    .rotate = rotate_tokens,
    .queries = kQueries,
    .attention_floats = attention_floats,
    .attention_few = attention_few,
    .attention_many = attention_many,
};

}  // namespace
}  // namespace q4s
