#include "quant/couple.h"

#include <algorithm>

#include "kernels/dense.h"
#include "kernels/rotate.h"
#include "quant/block.h"
#include "quant/output_metric.h"

namespace q4s {
namespace {

constexpr int64_t kOutputTokens = 512;  // at most
constexpr int64_t kTokens = 64;         // a piece of work

std::vector<float> read(Backend& b, const float* from, int64_t count) {
  std::vector<float> to(count);
  b.read(to.data(), reinterpret_cast<const std::byte*>(from), to.size() * sizeof(float));
  return to;
}

}  // namespace

RowCoupling couple_attention(const LlamaConfig& c, Backend& backend, const float* in, const float* w,
                             int64_t sequences, int64_t seq_len, const Team& team) {
  const int64_t d = c.dim, rows = c.q_dim() + c.kv_dim(), length = std::min(seq_len, coupling_positions(c));
  const std::vector<float> x = read(backend, in, sequences * seq_len * d),
                           weights = read(backend, w, rows * d);
  std::vector<float> qk(sequences * length * rows);
  team([&](Part part) {
    const auto [begin, end] = part.of(sequences * length, kTokens);
    for (int64_t t = begin; t < end; ++t) {  // products in pieces that end with a sequence or a piece of work
      const int64_t s = t / length, p = t % length,
                    n = std::min({kTokens - t % kTokens, length - p, end - t});
      dense_gemm(Transpose::kNo, Transpose::kYes, n, rows, d, 1.0f, &x[(s * seq_len + p) * d], d,
                 weights.data(), d, 0.0f, &qk[t * rows], rows);
      t += n - 1;
    }
  });
  return couple_rows(attention_metric(c, qk, sequences, length, team), c.heads + c.kv_heads, c.head_dim,
                     unit_rows(c, Unit::kQkv), team);
}

RowCoupling couple_output(const LlamaModel& m, Backend& backend, const Rotation* r1, const float* x,
                          int64_t tokens, const Team& team) {
  const int64_t d = m.config.dim, stride = ceil_div(tokens, kOutputTokens);
  std::vector<float> all = read(backend, x, tokens * d), some;
  for (int64_t t = stride - 1; t < tokens; t += stride) some.insert(some.end(), &all[t * d], &all[t * d] + d);
  const auto rotate = [&](std::vector<float>& y, bool back) {
    const int64_t n = int64_t(y.size()) / d;
    if (r1) rotate_cpu({y.data(), r1->signs.data(), r1->factor.data(), y.data(), n, d, r1->m, back});
  };
  const auto transpose = [&](const std::vector<float>& y) {
    std::vector<float> z(y.size());
    for (int64_t i = 0; i < d; ++i)
      for (int64_t j = 0; j < d; ++j) z[j * d + i] = y[i * d + j];
    return z;
  };
  rotate(some, true);
  const Weight& head = m.weights.head.view.n ? m.weights.head : m.weights.embed;
  std::vector<float> metric = logit_metric(
      m.config, std::move(some), unpack(m.weights.final_norm, team),
      [&](int64_t begin, int64_t end, float* to) { unpack_rows(head, begin, end, to, team); }, team);
  rotate(metric, false);  // M R, then (M R)^T R = R^T M R
  metric = transpose(metric);
  rotate(metric, false);
  return couple_rows(metric, 1, d, d, team);
}

}  // namespace q4s
