// The couplings of a model's linears, from what the walk over it holds in backend memory.
#pragma once
#include "models/llama.h"
#include "quant/rotation.h"
#include "quant/row_coupling.h"
#include "runtime/backend.h"

namespace q4s {

// The sequences whose activations the metrics are made of, at most so many, and of each so many positions:
// few, since their products are the host's work.
inline int64_t coupling_sequences(const LlamaConfig& c) { return c.dim > 2048 ? 2 : 4; }
inline int64_t coupling_positions(const LlamaConfig& c) { return c.dim > 2048 ? 256 : 512; }

// Queries and keys of a block: in (sequences * seq_len, D) the full-precision model's inputs of qkv, w (N, D)
// its weights. Values are free.
RowCoupling couple_attention(const LlamaConfig&, Backend&, const float* in, const float* w, int64_t sequences,
                             int64_t seq_len, const Team&);

// Outputs of the last block's down: x (tokens, D) the full-precision model's residual stream after it,
// rotated by r1 where that is given.
RowCoupling couple_output(const LlamaModel&, Backend&, const Rotation* r1, const float* x, int64_t tokens,
                          const Team&);

}  // namespace q4s
