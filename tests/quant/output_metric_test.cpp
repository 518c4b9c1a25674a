#include "quant/output_metric.h"

#include <doctest/doctest.h>

#include <cmath>

#include "tests/quant/oracle.h"

using namespace q4s;

namespace {

using Row = std::vector<double>;

Row softmax(const Row& z) {
  double top = z[0], sum = 0;
  for (double v : z) top = std::max(top, v);
  Row p(z.size());
  for (size_t i = 0; i < z.size(); ++i) sum += p[i] = std::exp(z[i] - top);
  for (double& v : p) v /= sum;
  return p;
}

double divergence(const Row& p, const Row& q) {
  double sum = 0;
  for (size_t i = 0; i < p.size(); ++i) sum += p[i] * std::log(p[i] / q[i]);
  return sum;
}

double quadratic(const float* m, const std::vector<float>& e, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) sum += double(e[i]) * m[i * n + j] * e[j];
  return sum;
}

// One head's vector turned by its position.
Row turned(const float* x, const LlamaConfig& c, const std::vector<float>& rope, int64_t position) {
  const int64_t hd = c.head_dim, half = hd / 2;
  Row y(hd);
  for (int64_t i = 0; i < half; ++i) {
    const double cs = rope[position * hd + 2 * i], sn = rope[position * hd + 2 * i + 1];
    y[i] = x[i] * cs - x[i + half] * sn;
    y[i + half] = x[i] * sn + x[i + half] * cs;
  }
  return y;
}

}  // namespace

TEST_CASE(
    "attention metric: twice the divergence of the attention when a query or a key is off by a little") {
  LlamaConfig c;
  c.heads = 4, c.kv_heads = 2, c.head_dim = 6, c.context = 64;
  const int64_t hd = c.head_dim, length = 40, sequences = 2, width = c.q_dim() + c.kv_dim();
  const std::vector<float> qk = oracle::gaussian(sequences * length * width, 1, 1.5f);
  const std::vector<float> m = attention_metric(c, qk, sequences, length, oracle::parts(3));
  REQUIRE(int64_t(m.size()) == (c.heads + c.kv_heads) * hd * hd);
  const std::vector<float> rope = rope_table(c, length);
  // Attention of query p of head h, with errors added to the query and to the key at `key`.
  const auto attention = [&](int64_t s, int64_t h, int64_t p, const std::vector<float>* dq, int64_t key,
                             const std::vector<float>* dk) {
    const auto vector = [&](int64_t column, int64_t t, const std::vector<float>* off) {
      std::vector<float> x(hd);
      for (int64_t i = 0; i < hd; ++i)
        x[i] = qk[(s * length + t) * width + column + i] + (off ? (*off)[i] : 0.0f);
      return turned(x.data(), c, rope, t);
    };
    const Row q = vector(h * hd, p, dq);
    Row z;
    for (int64_t t = 0; t <= p; ++t) {
      const Row k = vector(c.q_dim() + h / 2 * hd, t, t == key ? dk : nullptr);
      double dot = 0;
      for (int64_t i = 0; i < hd; ++i) dot += q[i] * k[i];
      z.push_back(dot / std::sqrt(double(hd)));
    }
    return softmax(z);
  };
  for (uint32_t seed = 0; seed < 4; ++seed) {
    const std::vector<float> e = oracle::gaussian(hd, 50 + seed, 0.01f);
    for (int64_t h = 0; h < c.heads; ++h) {
      double sum = 0;
      for (int64_t s = 0; s < sequences; ++s)
        for (int64_t p = 8; p < length; p += 16)
          sum += divergence(attention(s, h, p, nullptr, -1, nullptr), attention(s, h, p, &e, -1, nullptr));
      CHECK(2 * double(hd) * sum == doctest::Approx(quadratic(&m[h * hd * hd], e, hd)).epsilon(0.05));
    }
    for (int64_t g = 0; g < c.kv_heads; ++g) {
      double sum = 0;
      for (int64_t s = 0; s < sequences; ++s)
        for (int64_t t = 0; t < length; t += 16)  // each stands for 16, the first for itself
          for (int64_t h = 2 * g; h < 2 * g + 2; ++h)
            for (int64_t p = t; p < length; ++p)
              sum += (t ? 16 : 1) *
                     divergence(attention(s, h, p, nullptr, -1, nullptr), attention(s, h, p, nullptr, t, &e));
      CHECK(2 * double(hd) * sum ==
            doctest::Approx(quadratic(&m[(c.heads + g) * hd * hd], e, hd)).epsilon(0.05));
    }
  }
  CHECK(attention_metric(c, qk, sequences, length, oracle::parts(1)) == m);
}

TEST_CASE(
    "logit metric: twice the divergence of the output when the stream before the final norm is off by a "
    "little") {
  LlamaConfig c;
  c.dim = 12, c.vocab = 3000, c.eps = 1e-5f;
  const int64_t d = c.dim, v = c.vocab;
  const std::vector<float> head = oracle::gaussian(v * d, 2), x = oracle::gaussian(d, 3, 2.0f);
  std::vector<float> gain = oracle::gaussian(d, 4, 0.2f);
  for (float& g : gain) g += 1.0f;
  const auto rows = [&](int64_t begin, int64_t end, float* to) {
    std::copy(head.begin() + begin * d, head.begin() + end * d, to);
  };
  const auto output = [&](const std::vector<float>& stream) {
    double squares = 0;
    for (float f : stream) squares += double(f) * f;
    const double scale = 1 / std::sqrt(squares / double(d) + double(c.eps));
    Row z(v);
    for (int64_t i = 0; i < v; ++i)
      for (int64_t j = 0; j < d; ++j) z[i] += double(head[i * d + j]) * stream[j] * scale * gain[j];
    return softmax(z);
  };
  const std::unique_ptr<Backend> cpu = make_cpu_backend(2);
  const std::unique_ptr<UnitSolver> solver = make_unit_solver(*cpu);
  const auto metric_of = [&](const std::vector<float>& stream, int threads) {
    return logit_metric(c, stream, gain, rows, *cpu, *solver, oracle::parts(threads));
  };
  const std::vector<float> m = metric_of(x, 3);
  for (int64_t i = 0; i < d; ++i)
    for (int64_t j = 0; j < d; ++j) CHECK(m[i * d + j] == m[j * d + i]);
  double along = 0, length = 0;
  for (uint32_t seed = 0; seed < 5; ++seed) {
    std::vector<float> e = oracle::gaussian(d, 70 + seed, 0.01f), moved = x;
    along = length = 0;
    for (int64_t i = 0; i < d; ++i) along += double(e[i]) * x[i], length += double(x[i]) * x[i];
    for (int64_t i = 0; i < d; ++i)
      e[i] -= float(along / length) * x[i];  // across the stream: the norm stays
    for (int64_t i = 0; i < d; ++i) moved[i] += e[i];
    CHECK(2 * divergence(output(x), output(moved)) ==
          doctest::Approx(quadratic(m.data(), e, d)).epsilon(0.05));
  }
  // Two tokens: the mean.
  const std::vector<float> y = oracle::gaussian(d, 5, 3.0f), other = metric_of(y, 1);
  std::vector<float> both = x;
  both.insert(both.end(), y.begin(), y.end());
  const std::vector<float> mean = metric_of(both, 2);
  double largest = 0;
  for (float f : m) largest = std::max(largest, double(std::abs(f)));
  for (int64_t i = 0; i < d * d; ++i) CHECK(std::abs(mean[i] - (m[i] + other[i]) / 2) < 1e-4 * largest);
}
