// The fast kernels of cpu_kernels.h compiled for one instruction set.
#include "kernels/simd_attention.h"
#include "kernels/simd_float.h"
#include "kernels/simd_int8_gemm.h"
#include "kernels/simd_int8_gemv.h"
#include "kernels/simd_int8_quantize.h"

namespace q4s {

const CpuKernels kPortableKernels = {decode_row,     dot_rows,      kTile,           token_bytes,
                                     tile_bytes,     panel_bytes,   quantize_tokens, quantize_tiles,
                                     gemv,           gemm,          rms_norm_tokens, swiglu_columns,
                                     rope_kv_tokens, rotate_tokens, kQueries,        attention_floats,
                                     attention_few,  attention_many};

}  // namespace q4s
