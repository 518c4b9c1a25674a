#include "quant/rotation.h"

#include <doctest/doctest.h>

#include "kernels/rotate.h"
#include "quant/weight_work.h"
#include "tests/quant/oracle.h"

using namespace q4s;

namespace {

std::vector<double> dense(const Rotation& r) {  // R by its definition
  const int64_t p = r.dim / r.m;
  std::vector<double> m(r.dim * r.dim);
  for (int64_t a = 0; a < r.dim; ++a)
    for (int64_t b = 0; b < r.dim; ++b) {
      const double h = (__builtin_popcountll(uint64_t(a / r.m) & uint64_t(b / r.m)) % 2 ? -1.0 : 1.0) /
                       std::sqrt(double(p));
      m[a * r.dim + b] = r.signs[a] * h * r.factor[a % r.m * r.m + b % r.m];
    }
  return m;
}

struct BlockWeights {
  BlockNorms norms;
  std::vector<float> qkv, o, gate_up, down;
};

// One block on a residual stream (T, D) in double; rope left out (it acts on q and k, which are not rotated).
std::vector<double> block(const LlamaConfig& c, const BlockWeights& b, std::vector<double> x,
                          int64_t tokens) {
  const auto norm = [&](const std::vector<double>& v, const std::vector<float>& gain) {
    std::vector<double> y(v.size());
    for (int64_t t = 0; t < tokens; ++t) {
      double s = 0;
      for (int64_t j = 0; j < c.dim; ++j) s += v[t * c.dim + j] * v[t * c.dim + j];
      for (int64_t j = 0; j < c.dim; ++j)
        y[t * c.dim + j] = gain[j] * v[t * c.dim + j] / std::sqrt(s / double(c.dim) + c.eps);
    }
    return y;
  };
  const auto linear = [&](const std::vector<double>& v, const std::vector<float>& w, int64_t n, int64_t k) {
    std::vector<double> y(tokens * n);
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < k; ++j) y[t * n + i] += v[t * k + j] * w[i * k + j];
    return y;
  };
  const auto qkv = linear(norm(x, b.norms.attn), b.qkv, c.qkv_dim(), c.dim);
  std::vector<double> mixed(tokens * c.q_dim());
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t h = 0; h < c.heads; ++h) {
      const double* q = &qkv[t * c.qkv_dim() + h * c.head_dim];
      const int64_t kv = h / (c.heads / c.kv_heads) * c.head_dim;
      std::vector<double> p(t + 1);
      double sum = 0;
      for (int64_t s = 0; s <= t; ++s) {
        double dot = 0;
        for (int64_t j = 0; j < c.head_dim; ++j) dot += q[j] * qkv[s * c.qkv_dim() + c.q_dim() + kv + j];
        sum += p[s] = std::exp(dot / std::sqrt(double(c.head_dim)));
      }
      for (int64_t s = 0; s <= t; ++s)
        for (int64_t j = 0; j < c.head_dim; ++j)
          mixed[t * c.q_dim() + h * c.head_dim + j] +=
              p[s] / sum * qkv[s * c.qkv_dim() + c.q_dim() + c.kv_dim() + kv + j];
    }
  }
  const auto attn = linear(mixed, b.o, c.dim, c.q_dim());
  for (size_t i = 0; i < x.size(); ++i) x[i] += attn[i];
  const auto both = linear(norm(x, b.norms.mlp), b.gate_up, 2 * c.hidden, c.dim);
  std::vector<double> act(tokens * c.hidden);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t i = 0; i < c.hidden; ++i) {
      const double g = both[t * 2 * c.hidden + i];
      act[t * c.hidden + i] = g / (1 + std::exp(-g)) * both[t * 2 * c.hidden + c.hidden + i];
    }
  const auto mlp = linear(act, b.down, c.dim, c.hidden);
  for (size_t i = 0; i < x.size(); ++i) x[i] += mlp[i];
  return x;
}

}  // namespace

TEST_CASE("R is orthogonal and flat for any size") {
  for (int64_t dim : {1, 2, 9, 24, 64, 72, 172, 576}) {
    const Rotation r = make_rotation(dim, 7);
    const auto m = dense(r);
    double worst = 0, top = 0;
    for (int64_t a = 0; a < dim; ++a)
      for (int64_t b = 0; b < dim; ++b) {
        double s = 0;
        for (int64_t j = 0; j < dim; ++j) s += m[a * dim + j] * m[b * dim + j];
        worst = std::max(worst, std::fabs(s - (a == b)));
        top = std::max(top, std::fabs(m[a * dim + b]));
      }
    CHECK(worst < 1e-6);
    CHECK(top <= std::sqrt(2.0 / double(dim)) * 1.0001);
  }
}

TEST_CASE("the kernel applies R and undoes it") {
  const Rotation r = make_rotation(72, 3);
  const auto m = dense(r);
  const auto x = oracle::gaussian(5 * 72, 1);
  std::vector<float> y(x.size()), back(x.size());
  rotate_cpu({x.data(), r.signs.data(), r.factor.data(), y.data(), 5, 72, r.m, false});
  rotate_cpu({y.data(), r.signs.data(), r.factor.data(), back.data(), 5, 72, r.m, true});
  for (int64_t t = 0; t < 5; ++t)
    for (int64_t j = 0; j < 72; ++j) {
      double s = 0;
      for (int64_t i = 0; i < 72; ++i) s += x[t * 72 + i] * m[i * 72 + j];
      CHECK(y[t * 72 + j] == doctest::Approx(s).epsilon(1e-5).scale(1.0));
      CHECK(back[t * 72 + j] == doctest::Approx(x[t * 72 + j]).epsilon(1e-5).scale(1.0));
    }
}

TEST_CASE("folded into a block, the function is unchanged") {
  LlamaConfig c;
  c.dim = 24;
  c.hidden = 20;
  c.heads = 4;
  c.kv_heads = 2;
  c.head_dim = 12;  // heads * head_dim != dim, and 12 = 4 * 3
  c.layers = 1;
  BlockWeights b{{oracle::gaussian(c.dim, 1), oracle::gaussian(c.dim, 4)},
                 oracle::gaussian(c.qkv_dim() * c.dim, 2, 0.3f),
                 oracle::gaussian(c.dim * c.q_dim(), 3, 0.3f),
                 oracle::gaussian(2 * c.hidden * c.dim, 5, 0.3f),
                 oracle::gaussian(c.dim * c.hidden, 6, 0.3f)};
  const int64_t tokens = 6;
  const auto x = oracle::gaussian(tokens * c.dim, 8);
  const Rotation r1 = make_rotation(c.dim, 1), r2 = make_rotation(c.head_dim, 2);
  BlockWeights turned = b;
  const auto backend = make_cpu_backend(3);
  const std::unique_ptr<WeightWork> work = make_weight_work(*backend);
  std::vector<float>* const units[] = {&turned.qkv, &turned.o, &turned.gate_up, &turned.down};
  for (Unit u : kUnits) rotate_unit(*work, c, u, units[int(u)]->data(), b.norms, r1, r2);
  const std::vector<float> ones(c.dim, 1.0f);
  turned.norms = {ones, ones};
  CHECK(turned.qkv != b.qkv);
  const auto m = dense(r1);
  const auto apply = [&](const std::vector<double>& v) {
    std::vector<double> y(v.size());
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t i = 0; i < c.dim; ++i)
        for (int64_t j = 0; j < c.dim; ++j) y[t * c.dim + j] += v[t * c.dim + i] * m[i * c.dim + j];
    return y;
  };
  const std::vector<double> start(x.begin(), x.end());
  const auto expected = apply(block(c, b, start, tokens)), got = block(c, turned, apply(start), tokens);
  for (size_t i = 0; i < got.size(); ++i)
    CHECK(got[i] == doctest::Approx(expected[i]).epsilon(1e-5).scale(1.0));
}
