// What an error in a linear's output costs, where the forward pass tells it in closed form: symmetric
// positive semidefinite matrices M with cost e^T M e, each of its own scale. From a few sequences of the
// full-precision model.
#pragma once
#include <functional>
#include <vector>

#include "models/config.h"
#include "quant/factor.h"
#include "quant/unit_solver.h"

namespace q4s {

// Queries and keys: half the variance, under the attention weights of a query, of the error in its scores is
// the divergence of the attention from what it was, so a query q (at position p, before the rotation R_p by
// position) has M = mean R_p^T Cov(k) R_p, k the keys it sees under its weights a, and a key at t has M =
// mean over the queries p that see it of a (1 - a) R_t^T q q^T R_t, all heads of a group together. Every 16th
// query, and keys 0 and every 16th, stand for all.
// qk (sequences * seq_len, q_dim + kv_dim) f32: queries and keys before the rotation. Returns (heads +
// kv_heads, hd, hd).
std::vector<float> attention_metric(const LlamaConfig&, const std::vector<float>& qk, int64_t sequences,
                                    int64_t seq_len, const Team&);

// The residual stream before the final norm: the divergence of the output is half of e^T M e with
// M = mean over tokens of G (E^T (diag p - p p^T) E) G / rms^2, G the gains of the norm, E the head (V, D), p
// the output's distribution. (The part of the norm that takes the direction of x out of e is left out.) x
// (tokens, D) the stream. head(begin, end, to) writes rows [begin, end) of E. Returns (D, D). Products are
// the solver's, in the backend's memory.
std::vector<float> logit_metric(const LlamaConfig&, std::vector<float> x, const std::vector<float>& gain,
                                const std::function<void(int64_t, int64_t, float*)>& head, Backend&,
                                UnitSolver&, const Team&);

}  // namespace q4s
