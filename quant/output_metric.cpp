#include "quant/output_metric.h"

#include <algorithm>
#include <cmath>

#include "kernels/dense.h"
#include "quant/buffer.h"

namespace q4s {
namespace {

constexpr int64_t kStride = 16;      // of the queries and keys that stand for all
constexpr int64_t kHeadRows = 2048;  // of the head at a time
constexpr int64_t kTokens = 16;      // pieces of work that do not depend on the thread count
constexpr Transpose kNo = Transpose::kNo, kYes = Transpose::kYes;

// x (rows, hd), each turned by `position` forward, or back.
void turn(float* x, int64_t rows, int64_t hd, const float* table, bool forward) {
  const int64_t half = hd / 2;
  for (int64_t r = 0; r < rows; ++r, x += hd)
    for (int64_t i = 0; i < half; ++i) {
      const float c = table[2 * i], s = forward ? table[2 * i + 1] : -table[2 * i + 1], a = x[i],
                  b = x[i + half];
      x[i] = a * c - b * s;
      x[i + half] = a * s + b * c;
    }
}

// m (hd, hd) += weight * d^T d of d (rows, hd).
void add_square(const std::vector<float>& d, int64_t rows, int64_t hd, float weight, float* m) {
  dense_gemm(kYes, kNo, hd, hd, rows, weight, d.data(), hd, d.data(), hd, 1.0f, m, hd);
}

// The weights (L, L) of one head's attention over keys k (L, hd), queries q (L, hd); what a query does not
// see is 0.
void attention_weights(const float* q, const float* k, int64_t length, int64_t hd, float* a) {
  dense_gemm(kNo, kYes, length, length, hd, 1.0f / std::sqrt(float(hd)), q, hd, k, hd, 0.0f, a, length);
  for (int64_t p = 0; p < length; ++p, a += length) {
    const float top = *std::max_element(a, a + p + 1);
    float sum = 0;
    for (int64_t t = 0; t <= p; ++t) sum += a[t] = std::exp(a[t] - top);
    for (int64_t t = 0; t <= p; ++t) a[t] /= sum;
    std::fill(a + p + 1, a + length, 0.0f);
  }
}

}  // namespace

std::vector<float> attention_metric(const LlamaConfig& c, const std::vector<float>& qk, int64_t sequences,
                                    int64_t seq_len, const Team& team) {
  const int64_t hd = c.head_dim, width = c.q_dim() + c.kv_dim(), shared = c.heads / c.kv_heads,
                length = seq_len;
  const std::vector<float> rope = rope_table(c, length);
  const int64_t square = hd * hd, items = c.kv_heads * sequences;
  // One group of heads on one sequence each: its heads' queries, then its keys.
  std::vector<std::vector<float>> parts(items, std::vector<float>((shared + 1) * square));
  team([&](Part part) {
    const auto [first, last] = part.of(items);
    std::vector<float> q(length * hd), k(length * hd), a(length * length), d(length * hd), mean(hd);
    for (int64_t item = first; item < last; ++item) {
      const int64_t g = item % c.kv_heads, s = item / c.kv_heads;
      const auto take = [&](int64_t column, std::vector<float>& to) {
        for (int64_t p = 0; p < length; ++p) {
          std::copy_n(&qk[(s * length + p) * width + column], hd, &to[p * hd]);
          turn(&to[p * hd], 1, hd, &rope[p * hd], true);
        }
      };
      take(c.q_dim() + g * hd, k);
      for (int64_t h = 0; h < shared; ++h) {
        take((g * shared + h) * hd, q);
        attention_weights(q.data(), k.data(), length, hd, a.data());
        for (int64_t p = kStride / 2; p < length; p += kStride) {
          const float* weight = &a[p * length];
          std::fill(mean.begin(), mean.end(), 0.0f);
          for (int64_t t = 0; t <= p; ++t)
            for (int64_t i = 0; i < hd; ++i) mean[i] += weight[t] * k[t * hd + i];
          for (int64_t t = 0; t <= p; ++t)
            for (int64_t i = 0; i < hd; ++i) d[t * hd + i] = std::sqrt(weight[t]) * (k[t * hd + i] - mean[i]);
          turn(d.data(), p + 1, hd, &rope[p * hd], false);
          add_square(d, p + 1, hd, 1.0f, &parts[item][h * square]);
        }
        for (int64_t t = 0; t < length; t += kStride) {
          for (int64_t p = t; p < length; ++p) {
            const float w = a[p * length + t], root = std::sqrt(w * (1 - w));
            for (int64_t i = 0; i < hd; ++i) d[(p - t) * hd + i] = root * q[p * hd + i];
          }
          turn(d.data(), length - t, hd, &rope[t * hd], false);
          add_square(d, length - t, hd, t == 0 ? 1.0f : float(kStride), &parts[item][shared * square]);
        }
      }
    }
  });
  std::vector<float> metric((c.heads + c.kv_heads) * square);
  for (int64_t item = 0; item < items; ++item) {
    const int64_t g = item % c.kv_heads;
    const std::vector<float>& from = parts[item];
    for (int64_t i = 0; i < shared * square; ++i) metric[g * shared * square + i] += from[i];
    for (int64_t i = 0; i < square; ++i) metric[(c.heads + g) * square + i] += from[shared * square + i];
  }
  return metric;
}

std::vector<float> logit_metric(const LlamaConfig& c, std::vector<float> x, const std::vector<float>& gain,
                                const std::function<void(int64_t, int64_t, float*)>& head, Backend& backend,
                                UnitSolver& solver, const Team& team) {
  const int64_t d = c.dim, v = c.vocab, tokens = int64_t(x.size()) / d, slab = std::min(v, kHeadRows);
  const auto for_pieces = [&](int64_t count, int64_t piece, const auto& fn) {
    team([&](Part part) {
      const auto [first, last] = part.of(count, piece);
      for (int64_t i = first; i < last; i += piece) fn(i, std::min(i + piece, last));
    });
  };
  const auto put = [&](const std::vector<float>& from, int64_t count, const Buffer& to) {
    backend.write(to.bytes(), from.data(), size_t(count) * sizeof(float));
  };
  const auto get = [&](const Buffer& from, std::vector<float>& to) {
    backend.read(to.data(), from.bytes(), to.size() * sizeof(float));
  };
  std::vector<float> weight(tokens);  // 1 / rms^2 over the number of tokens
  for (int64_t t = 0; t < tokens; ++t) {
    double squares = 0;
    for (int64_t i = 0; i < d; ++i) squares += double(x[t * d + i]) * x[t * d + i];
    const double scale = 1 / (squares / double(d) + double(c.eps));
    weight[t] = float(scale / double(tokens));
    for (int64_t i = 0; i < d; ++i) x[t * d + i] *= float(std::sqrt(scale)) * gain[i];
  }
  const Buffer stream(backend, tokens * d, "the output's metric"),
      output(backend, tokens * v, "the output's metric"),
      part_of_head(backend, slab * d, "the output's metric"),
      scaled(backend, slab * d, "the output's metric"), means(backend, tokens * d, "the output's metric"),
      sum(backend, d * d, "the output's metric");
  std::vector<float> rows(slab * d);
  const auto for_head = [&](const std::function<void(int64_t begin, int64_t count)>& fn) {
    for (int64_t begin = 0; begin < v; begin += slab) {
      const int64_t count = std::min(slab, v - begin);
      head(begin, begin + count, rows.data());
      put(rows, count * d, part_of_head);
      fn(begin, count);
    }
  };
  put(x, tokens * d, stream);
  for_head([&](int64_t begin, int64_t count) {
    solver.product({kNo, kYes, tokens, count, d, 1.0f, stream.get(), d, part_of_head.get(), d, 0.0f,
                    output.get() + begin, v});
  });
  std::vector<float> p(tokens * v), all(v);  // all: of every token of the vocabulary, its weighted sum of p
  get(output, p);
  for_pieces(tokens, kTokens, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      float* row = &p[t * v];
      const float top = *std::max_element(row, row + v);
      double total = 0;
      for (int64_t i = 0; i < v; ++i) total += row[i] = std::exp(row[i] - top);
      for (int64_t i = 0; i < v; ++i) row[i] = float(row[i] / total);
    }
  });
  for_pieces(v, kHeadRows, [&](int64_t first, int64_t last) {
    std::vector<double> sums(last - first);
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t i = first; i < last; ++i) sums[i - first] += double(weight[t]) * p[t * v + i];
    for (int64_t i = first; i < last; ++i) all[i] = float(sums[i - first]);
  });
  put(p, tokens * v, output);
  // sum over the vocabulary of (weighted sum of p) E E^T, less that of the means E^T p of every token.
  for_head([&](int64_t begin, int64_t count) {
    const float keep = begin ? 1.0f : 0.0f;
    solver.product({kNo, kNo, tokens, d, count, 1.0f, output.get() + begin, v, part_of_head.get(), d, keep,
                    means.get(), d});
    for_pieces(count, kTokens, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i)
        for (int64_t j = 0; j < d; ++j) rows[i * d + j] *= all[begin + i];
    });
    put(rows, count * d, scaled);
    solver.product(
        {kYes, kNo, d, d, count, 1.0f, part_of_head.get(), d, scaled.get(), d, keep, sum.get(), d});
  });
  std::vector<float> mean(tokens * d), metric(d * d);
  get(means, mean);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t j = 0; j < d; ++j) mean[t * d + j] *= std::sqrt(weight[t]);
  put(mean, tokens * d, means);
  solver.product({kYes, kNo, d, d, tokens, -1.0f, means.get(), d, means.get(), d, 1.0f, sum.get(), d});
  get(sum, metric);
  for_pieces(d, kTokens, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      for (int64_t j = i; j < d; ++j) metric[i * d + j] *= gain[i] * gain[j];
  });
  for_pieces(d, kTokens, [&](int64_t first, int64_t last) {  // the products round the two halves differently
    for (int64_t i = first; i < last; ++i)
      for (int64_t j = 0; j < i; ++j) metric[i * d + j] = metric[j * d + i];
  });
  return metric;
}

}  // namespace q4s
