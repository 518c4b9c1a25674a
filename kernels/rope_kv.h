// Splits a stacked qkv row, rotates q and k by their position, and appends k and v to the cache.
//   q, k of one head: (a, b) = (x[i], x[i+hd/2])  ->  (a cos - b sin, a sin + b cos), angle from `table`
// The "half" pairing is that of Hugging Face checkpoints; GGUF's row order is undone when a model is loaded.
#pragma once
#include "kernels/cuda_stream.h"
#include "kernels/types.h"

namespace q4s {

enum class KvType : uint8_t { kF32, kF16 };
constexpr int64_t kv_type_bytes(KvType t) { return t == KvType::kF32 ? 4 : 2; }

// Where tokens of a step live: sequence s, position p -> cache row s*ctx + p. Positions are data, not shape.
struct Placement {
  const int32_t* position;  // (T) in [0, ctx)
  const int32_t* sequence;  // (T) in [0, sequences)
};

// The cache of one layer: k and v are each (sequences*ctx, Hkv*head_dim) of `type`. Where decoding sequences
// lie over each other, ctx is the distance between two, and positions may pass it.
struct KvLayer {
  void* k;
  void* v;
  KvType type;
  int64_t ctx;
};

struct RopeKvArgs {
  const float* qkv;    // (T, (H + 2 Hkv) * head_dim)
  const float* table;  // (ctx, head_dim/2, 2) cos, sin
  Placement at;
  KvLayer kv;
  float* q;  // (T, H * head_dim)
  int64_t tokens, heads, kv_heads, head_dim;
};
void rope_kv_cpu(const RopeKvArgs&, Part = {});  // the definition, in double
void rope_kv(const RopeKvArgs&, Part = {});      // vectorised
void rope_kv_cuda(const RopeKvArgs&, cudaStream_t);

}  // namespace q4s
