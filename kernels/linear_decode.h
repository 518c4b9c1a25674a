// Products y = f(x * W^T) for a few tokens, those that follow each other in one kernel, with attention
// between them: a decoding step at the speed of the memory.
//
// Prologue: with `gain`, x is normalised first (rms_norm.h). Epilogue: a residual is added; or silu(gate) *
// up is made of a stacked gate|up product (weight packed with RowMap::kPairHalves); or a stacked qkv product
// is rotated and its k and v appended to the cache (RowMap::kRope). Everything is in device memory; positions
// are read there.
//
// Values: x is rounded to 16 significant bits. For integer codes each 128 columns of it are then rounded to
// integers below 32640, the largest of them, and the sums of a group of codes are exact; for fp16 weights x
// is rounded to fp16 under a power of two for each 128 columns, so that no x is too large. These sums are
// added in f32, in an order that depends on K alone, but for int4 and five to eight tokens in another one. An
// x that is no number makes every output of its token none.
#pragma once
#include "kernels/cuda_stream.h"
#include "kernels/q4_tiles.h"
#include "kernels/rope_kv.h"

namespace q4s {

// A weight in the tiles of q4_tiles.h.
struct TiledWeight {
  Q4Layout layout;  // bits 4: int4 on `grid`; 8: int8; 16: fp16 without scales
  Grid grid = Grid::kInt;
  const uint8_t* codes = nullptr;    // layout.code_bytes(), 16-aligned
  const uint16_t* scales = nullptr;  // layout.scale_bytes(), 16-aligned
};

enum class Epilogue : uint8_t { kNone, kSwiglu, kRopeKv };

struct LinearDecodeArgs {
  const float* x;               // (T, K)
  const float* gain = nullptr;  // (K) or null: no norm
  float eps = 0;
  TiledWeight w;  // (N, K)
  Epilogue epilogue = Epilogue::kNone;
  const float* residual = nullptr;  // (T, N) or null; may be y; kNone only
  float* y;                         // (T, N); kSwiglu (T, N/2); kRopeKv q (T, H * head_dim)
  int64_t tokens;
  bool attends = false;  // in a chain: x, which nobody else sees then, is attention over what the product
                         // before it made (kRopeKv) and over older rows of its cache, each token of another
                         // sequence
  int64_t longest = 0;   // with `attends`: no position reaches this
  // kRopeKv, as in RopeKvArgs; head_dim is the layout's.
  const float* table = nullptr;  // (ctx, head_dim/2, 2) cos, sin
  Placement at{};                // (T) each
  KvLayer kv{};
  int64_t heads = 0, kv_heads = 0;
};

// Most tokens of a launch. Most for which launches beat a GEMM: on sm_90 the int4 GEMM is quicker from nine
// on, or from five where blocks cannot work in pairs, that of int8 from 17 on.
constexpr int64_t kLinearDecodeTokens = 16;
int64_t linear_decode_most_tokens(int bits);
// The most products of a chain. The most tokens for which one chain beats a kernel for each product, and of
// any format and device.
constexpr size_t kLinearDecodeChain = 128;
constexpr int64_t kLinearDecodeChainTokens = 8;
int64_t linear_decode_chain_tokens(int bits);
constexpr int64_t kLinearDecodeChainColumns = 32768;  // most of y where a product follows
// Contexts up to which a block makes the attention of a head alone; beyond, blocks share it out.
constexpr int64_t kLinearDecodeShort = 256;
// Most blocks among which a chain shares out attention, and the packets of 16 bytes that each hands to those
// it shares with.
constexpr int64_t kLinearDecodeAttend = 256, kLinearDecodeAttendPackets = 8 * (128 / 4 + 1);
constexpr size_t kLinearDecodeExchange = 4096 + 5 * kLinearDecodeChainTokens * kLinearDecodeChainColumns * 4 +
                                         kLinearDecodeAttend * kLinearDecodeAttendPackets * 16;
// Groups of 32, of 64 times a power of two, or whole rows; a slice of x must fit a block.
bool linear_decode_supported(const Q4Layout&);

// Whether a product may follow another in a chain: for attention, caches in fp16, heads of a
// multiple of 16 up to 128, up to 8 of them to a kv head.
bool linear_decode_follows(const LinearDecodeArgs& next, const LinearDecodeArgs& last);

// Runs a chain of `count` products in their order. x of a product may be y of the one before it, or of that
// before; its residual y of a product with as many rows, an even number before, or of none of the chain.
//
// exchange: kLinearDecodeExchange bytes of device memory, zero before its first use, for all chains of one
// stream: what the blocks hand each other between products; unused for a single product. A chain needs all
// multiprocessors at once.
// pdl: programmatic dependent launch. The kernel then may start while its predecessor in the stream still
// runs; it reads weights at once, and everything else only after the predecessor is complete.
// Throws CudaError; std::logic_error for a chain that reads what it may not.
void linear_decode_cuda(const LinearDecodeArgs* chain, size_t count, std::byte* exchange, cudaStream_t,
                        bool pdl);

}  // namespace q4s
