// The couplings of a model's linears, from what the walk over it holds in backend memory.
#pragma once
#include "models/llama.h"
#include "quant/rotation.h"
#include "quant/row_coupling.h"
#include "quant/unit_solver.h"
#include "runtime/backend.h"

namespace q4s {

// The sequences whose activations the metrics are made of, at most so many, and of each so many positions:
// few, since much of the work is the host's.
inline int64_t coupling_sequences(const LlamaConfig& c) { return c.dim > 2048 ? 2 : 4; }
inline int64_t coupling_positions(const LlamaConfig& c) { return c.dim > 2048 ? 256 : 512; }

// Queries and keys before the rotation by position, (sequences * positions, q_dim + kv_dim) in host memory:
// in (sequences * seq_len, D) the full-precision model's inputs of qkv, w (N, D) its weights.
std::vector<float> queries_and_keys(const LlamaConfig&, Backend&, UnitSolver&, const float* in,
                                    const float* w, int64_t sequences, int64_t seq_len);
// Queries and keys of a block; values are free. Needs nothing but the host's threads.
RowCoupling couple_attention(const LlamaConfig&, const std::vector<float>& qk, int64_t seq_len, const Team&);

// Outputs of the last block's down: x (tokens, D) the full-precision model's residual stream after it,
// rotated by r1 where that is given.
RowCoupling couple_output(const LlamaModel&, Backend&, UnitSolver&, const Rotation* r1, const float* x,
                          int64_t tokens, const Team&);

}  // namespace q4s
