#include "quant/couple.h"

#include <algorithm>

#include "kernels/rotate.h"
#include "quant/block.h"
#include "quant/buffer.h"
#include "quant/output_metric.h"

namespace q4s {
namespace {

constexpr int64_t kOutputTokens = 512;  // at most

std::vector<float> read(Backend& b, const float* from, int64_t count) {
  std::vector<float> to(count);
  b.read(to.data(), reinterpret_cast<const std::byte*>(from), to.size() * sizeof(float));
  return to;
}

int64_t positions(const LlamaConfig& c, int64_t seq_len) { return std::min(seq_len, coupling_positions(c)); }

}  // namespace

std::vector<float> queries_and_keys(const LlamaConfig& c, Backend& backend, UnitSolver& solver,
                                    const float* in, const float* w, int64_t sequences, int64_t seq_len) {
  const int64_t d = c.dim, rows = c.q_dim() + c.kv_dim(), length = positions(c, seq_len);
  const Buffer qk(backend, sequences * length * rows, "queries and keys");
  for (int64_t s = 0; s < sequences; ++s)
    solver.product({Transpose::kNo, Transpose::kYes, length, rows, d, 1.0f, in + s * seq_len * d, d, w, d,
                    0.0f, qk.get() + s * length * rows, rows});
  return read(backend, qk.get(), sequences * length * rows);
}

RowCoupling couple_attention(const LlamaConfig& c, const std::vector<float>& qk, int64_t seq_len,
                             const Team& team) {
  const int64_t length = positions(c, seq_len),
                sequences = int64_t(qk.size()) / (length * (c.q_dim() + c.kv_dim()));
  return couple_rows(attention_metric(c, qk, sequences, length, team), c.heads + c.kv_heads, c.head_dim,
                     unit_rows(c, Unit::kQkv), team);
}

RowCoupling couple_output(const LlamaModel& m, Backend& backend, UnitSolver& solver, const Rotation* r1,
                          const float* x, int64_t tokens, const Team& team) {
  const int64_t d = m.config.dim, stride = ceil_div(tokens, kOutputTokens);
  std::vector<float> all = read(backend, x, tokens * d), some;
  for (int64_t t = stride - 1; t < tokens; t += stride) some.insert(some.end(), &all[t * d], &all[t * d] + d);
  const auto rotate_rows = [&](std::vector<float>& y, bool back) {
    const int64_t n = int64_t(y.size()) / d;
    if (!r1) return;
    team([&](Part part) {
      rotate({y.data(), r1->signs.data(), r1->factor.data(), y.data(), n, d, r1->m, back}, part);
    });
  };
  const auto transpose = [&](const std::vector<float>& y) {
    std::vector<float> z(y.size());
    team([&](Part part) {
      const auto [begin, end] = part.of(d);
      for (int64_t i = begin; i < end; ++i)
        for (int64_t j = 0; j < d; ++j) z[i * d + j] = y[j * d + i];
    });
    return z;
  };
  rotate_rows(some, true);
  const Weight& head = m.weights.head.view.n ? m.weights.head : m.weights.embed;
  std::vector<float> metric = logit_metric(
      m.config, std::move(some), unpack(m.weights.final_norm, team),
      [&](int64_t begin, int64_t end, float* to) { unpack_rows(head, begin, end, to, team); }, backend,
      solver, team);
  rotate_rows(metric, false);  // M R, then (M R)^T R = R^T M R
  metric = transpose(metric);
  rotate_rows(metric, false);
  return couple_rows(metric, 1, d, d, team, [&](std::vector<float> h, int64_t k, double damp) {
    return solver.factor_of(std::move(h), k, damp);
  });
}

}  // namespace q4s
