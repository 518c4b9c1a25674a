// The quantiser's steps on the CPU: the definition. Work is cut into fixed chunks of rows, and every product
// is made chunk by chunk, so that the result is the same bits for every thread count.
#include "kernels/gptq.h"

#include <cmath>
#include <limits>
#include <vector>

#include "kernels/dense.h"
#include "kernels/half.h"
#include "kernels/wide.h"

namespace q4s {
namespace {

constexpr int64_t kRows = 96;  // rows of a chunk: enough for an efficient product, few enough to stay in L2
constexpr int64_t kGramRows = 144;  // of a sum over tokens, where the longer product pays for more

// fn(first row, number of rows) for every chunk of this part.
template <class Fn>
void for_chunks(int64_t n, int64_t rows, Part part, Fn fn) {
  const Part::Range r = part.of(n, rows);
  for (int64_t i = r.begin; i < r.end; i += rows) fn(i, std::min(rows, n - i));
}

constexpr int kMultiples = 71;  // 0.50 .. 1.20
constexpr int kLanes = 16;      // candidates judged together; their lists are padded to a multiple

// Errors of the candidate scales (C, a multiple of kLanes) on w (K); see GptqScalesArgs.
Q4S_WIDE void judge(const float* w, const float* weight, int64_t k, const Levels& l, const float* scale,
                    float* error, int candidates) {
  typedef float Lanes __attribute__((vector_size(4 * kLanes)));
  const Lanes low = Lanes{} + float(l.low), high = Lanes{} + float(l.high), shift = Lanes{} + l.shift;
  for (int c = 0; c < candidates; c += kLanes) {
    Lanes s, inverse, sum = {};
    for (int i = 0; i < kLanes; ++i) {
      s[i] = scale[c + i];
      inverse[i] = s[i] == 0.0f ? 0.0f : 1.0f / s[i];
    }
    for (int64_t j = 0; j < k; ++j) {
      Lanes t = w[j] * inverse - shift;
      t = t < low ? low : t;
      t = t > high ? high : t;
      const Lanes e = w[j] - s * ((t + kRoundEven) - kRoundEven + shift);
      sum += (weight ? weight[j] : 1.0f) * (e * e);
    }
    for (int i = 0; i < kLanes; ++i) error[c + i] = sum[i];
  }
}

// y -= a x
Q4S_WIDE void subtract(float a, const float* __restrict x, float* __restrict y, int64_t n) {
  for (int64_t j = 0; j < n; ++j) y[j] -= a * x[j];
}

float extreme(const float* w, int64_t k) {
  float best = 0.0f;
  for (int64_t j = 0; j < k; ++j) best = std::fabs(w[j]) > std::fabs(best) ? w[j] : best;
  return best;
}

uint16_t search_scale(const float* w, const float* weight, int64_t k, const Levels& l, float base) {
  constexpr int kMost = (2 * kMultiples + kLanes - 1) / kLanes * kLanes;
  const int candidates = (l.negative ? 2 : 1) * kMultiples;
  const int padded = (candidates + kLanes - 1) / kLanes * kLanes;
  float scale[kMost] = {}, error[kMost];
  for (int i = 0; i < kMultiples; ++i) {
    scale[i] = half_to_float(float_to_half(base * (float(50 + i) / 100.0f)));
    if (l.negative) scale[kMultiples + i] = -scale[i];
  }
  judge(w, weight, k, l, scale, error, padded);
  float best = 0.0f, best_error = std::numeric_limits<float>::infinity();
  for (int c = 0; c < candidates; ++c)
    if (error[c] < best_error) best = scale[c], best_error = error[c];

  for (int round = 0; round < 3 && best != 0.0f; ++round) {
    float wv = 0.0f, vv = 0.0f;
    for (int64_t j = 0; j < k; ++j) {
      const float v = float(int32_t(nearest_code(w[j], best, l)) - l.offset) + l.shift;
      const float h = weight ? weight[j] : 1.0f;
      wv += h * (w[j] * v);
      vv += h * (v * v);
    }
    if (!(vv > 0.0f)) break;
    float next[kLanes] = {half_to_float(float_to_half(wv / vv))}, next_error[kLanes];
    judge(w, weight, k, l, next, next_error, kLanes);
    if (!(next_error[0] < best_error)) break;
    best = next[0], best_error = next_error[0];
  }
  return float_to_half(best);
}

// levels[j] = q + shift and, where asked, value[j] of one row.
void row_levels(const uint8_t* codes, int64_t k, const Levels& l, float* levels) {
  for (int64_t j = 0; j < k; ++j) levels[j] = float(int32_t(codes[j]) - l.offset) + l.shift;
}

// e = w - q of one row.
void row_error(const float* w, const uint16_t* scales, const uint8_t* codes, int64_t k, int64_t group,
               const Levels& l, float* e) {
  for (int64_t begin = 0; begin < k; begin += group) {
    const float s = half_to_float(scales[begin / group]);
    const int64_t end = std::min(k, begin + group);
    for (int64_t j = begin; j < end; ++j) e[j] = w[j] - l.value(codes[j], s);
  }
}

double dot(const float* a, const float* b, int64_t k) {
  double sum[4] = {0, 0, 0, 0};
  int64_t j = 0;
  for (; j + 4 <= k; j += 4)
    for (int i = 0; i < 4; ++i) sum[i] += double(a[j + i]) * double(b[j + i]);
  for (; j < k; ++j) sum[0] += double(a[j]) * double(b[j]);
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// Solves the symmetric positive definite M (G, G; lower triangle, overwritten) s = b in place. False: not
// definite.
bool solve_small(double* m, double* b, int64_t g) {
  for (int64_t j = 0; j < g; ++j) {
    for (int64_t i = j; i < g; ++i) {
      double s = m[i * g + j];
      for (int64_t l = 0; l < j; ++l) s -= m[i * g + l] * m[j * g + l];
      if (i == j) {
        if (!(s > 0.0)) return false;
        m[j * g + j] = std::sqrt(s);
      } else {
        m[i * g + j] = s / m[j * g + j];
      }
    }
  }
  for (int64_t i = 0; i < g; ++i) {
    for (int64_t l = 0; l < i; ++l) b[i] -= m[i * g + l] * b[l];
    b[i] /= m[i * g + i];
  }
  for (int64_t i = g - 1; i >= 0; --i) {
    for (int64_t l = i + 1; l < g; ++l) b[i] -= m[l * g + i] * b[l];
    b[i] /= m[i * g + i];
  }
  return true;
}

// s^T M s - 2 b^T s with the lower triangle of M.
double quadratic(const double* m, const double* b, const double* s, int64_t g) {
  double sum = 0.0;
  for (int64_t i = 0; i < g; ++i) {
    double row = 0.5 * m[i * g + i] * s[i] - b[i];
    for (int64_t l = 0; l < i; ++l) row += m[i * g + l] * s[l];
    sum += 2.0 * s[i] * row;
  }
  return sum;
}

// New scales (G) of one row, given M (G, G lower) and b (G); false when the old ones are to be kept.
bool refit_row(std::vector<double>& m, std::vector<double>& b, uint16_t* scales, int64_t g) {
  std::vector<double> old(g), next(g), work;
  for (int64_t i = 0; i < g; ++i) {
    old[i] = half_to_float(scales[i]);
    if (m[i * g + i] > 0.0) continue;
    m[i * g + i] = 1.0;  // no non-zero level: the row and column are zero, and the old scale stays
    b[i] = old[i];
  }
  work = m;
  next = b;
  if (!solve_small(work.data(), next.data(), g)) return false;
  std::vector<uint16_t> rounded(g);
  for (int64_t i = 0; i < g; ++i) {
    rounded[i] = float_to_half(float(next[i]));
    next[i] = half_to_float(rounded[i]);
  }
  if (!(quadratic(m.data(), b.data(), next.data(), g) < quadratic(m.data(), b.data(), old.data(), g)))
    return false;
  std::copy(rounded.begin(), rounded.end(), scales);
  return true;
}

}  // namespace

void gptq_gram_cpu(const GptqGramArgs& a, Part part) {
  // Panels are dealt out to and fro, since those of a triangle differ in length.
  for (int64_t p = 0; p * kGramRows < a.m; ++p) {
    const int64_t turn = p % part.count, i = p * kGramRows;
    if ((p / part.count % 2 == 0 ? turn : part.count - 1 - turn) != part.index) continue;
    const int64_t rows = std::min(kGramRows, a.m - i), first = a.upper ? i : 0;
    dense_gemm(Transpose::kYes, Transpose::kNo, rows, a.k - first, a.tokens, a.factor, a.a + i, a.m,
               a.b + first, a.k, 1.0f, a.c + i * a.k + first, a.k);
  }
}

void gptq_scales_cpu(const GptqScalesArgs& a, Part part) {
  const int64_t groups = ceil_div(a.k, a.group);
  for_chunks(a.n, kRows, part, [&](int64_t first, int64_t rows) {
    for (int64_t i = first; i < first + rows; ++i) {
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t begin = g * a.group, k = std::min(a.group, a.k - begin);
        const float* w = a.w + i * a.k + begin;
        const float top = extreme(w, k), base = std::fabs(top) / a.levels.reach;
        uint16_t scale = 0;
        if (top != 0.0f) {
          scale = a.search ? search_scale(w, a.weight ? a.weight + begin : nullptr, k, a.levels, base)
                           : float_to_half(a.levels.negative && top > 0.0f ? -base : base);
        }
        a.scales[i * groups + g] = half_to_float(scale) == 0.0f ? 0 : scale;
      }
    }
  });
}

void gptq_round_cpu(const GptqRoundArgs& a, Part part) {
  const int64_t groups = ceil_div(a.k, a.group);
  for_chunks(a.n, kRows, part, [&](int64_t first, int64_t rows) {
    for (int64_t i = first; i < first + rows; ++i)
      for (int64_t g = 0; g < groups; ++g) {
        const float scale = half_to_float(a.scales[i * groups + g]);
        for (int64_t j = g * a.group; j < std::min(a.k, (g + 1) * a.group); ++j)
          a.codes[i * a.k + j] = nearest_code(a.w[i * a.k + j], scale, a.levels);
      }
  });
}

void gptq_solve_cpu(const GptqSolveArgs& a, Part part) {
  const int64_t k = a.k, groups = ceil_div(k, a.group);
  const Levels levels = a.levels;
  std::vector<int32_t> group(k);  // of each step
  for (int64_t i = 0; i < k; ++i) group[i] = a.order[i] / int32_t(a.group);
  for_chunks(a.n, kRows, part, [&](int64_t first, int64_t rows) {
    std::vector<float> err(rows * kGptqBlock), scale(groups);
    for (int64_t begin = 0; begin < k; begin += kGptqBlock) {
      const int64_t size = std::min(kGptqBlock, k - begin);
      for (int64_t r = 0; r < rows; ++r) {
        float* w = a.w + (first + r) * k + begin;
        for (int64_t g = 0; g < groups; ++g) scale[g] = half_to_float(a.scales[(first + r) * groups + g]);
        for (int64_t i = 0; i < size; ++i) {
          const float* u = a.u + (begin + i) * k + begin;
          const int32_t column = a.order[begin + i];
          const float s = scale[group[begin + i]];
          const uint8_t code = nearest_code(w[i], s, levels);
          a.codes[(first + r) * k + column] = code;
          const float e = (w[i] - levels.value(code, s)) / u[i];
          err[r * kGptqBlock + i] = e;
          subtract(e, u + i + 1, w + i + 1, size - i - 1);
        }
      }
      const int64_t end = begin + size;
      dense_gemm(Transpose::kNo, Transpose::kNo, rows, k - end, size, -1.0f, err.data(), kGptqBlock,
                 a.u + begin * k + end, k, 1.0f, a.w + first * k + end, k);
    }
  });
}

void gptq_sweep_cpu(const GptqRefineArgs& a, Part part) {
  const int64_t k = a.k, groups = ceil_div(k, a.group);
  const Levels levels = a.levels;
  for_chunks(a.n, kRows, part, [&](int64_t first, int64_t rows) {
    std::vector<float> error(rows * k), gradient(rows * k);
    for (int64_t r = 0; r < rows; ++r)
      row_error(a.w + (first + r) * k, a.scales + (first + r) * groups, a.codes + (first + r) * k, k, a.group,
                a.levels, &error[r * k]);
    dense_gemm(Transpose::kNo, Transpose::kNo, rows, k, k, 1.0f, error.data(), k, a.h, k, 0.0f,
               gradient.data(), k);
    for (int64_t r = 0; r < rows; ++r) {
      float* g = &gradient[r * k];
      uint8_t* codes = a.codes + (first + r) * k;
      SweepDither dither(a.pass, first + r, 0);
      for (int64_t begin = 0; begin < k; begin += a.group) {
        const float s = half_to_float(a.scales[(first + r) * groups + begin / a.group]);
        if (s == 0.0f) continue;
        for (int64_t j = begin; j < std::min(k, begin + a.group); ++j) {
          const float value = levels.value(codes[j], s);
          float best = value + g[j] / a.h[j * k + j];
          if (a.dither > 0.0f) {
            if (j % 4 == 0 || j == begin) dither = SweepDither(a.pass, first + r, j);
            best += s * (a.dither * dither.at(j));
          }
          const uint8_t code = nearest_code(best, s, levels);
          if (code == codes[j]) continue;
          codes[j] = code;
          subtract(levels.value(code, s) - value, a.h + j * k, g, k);
        }
      }
    }
  });
}

void gptq_refit_cpu(const GptqRefineArgs& a, Part part) {
  const int64_t k = a.k, groups = ceil_div(k, a.group);
  const int64_t grain = groups > 64 ? 16 : kRows;  // G x G doubles a row
  for_chunks(a.n, grain, part, [&](int64_t first, int64_t rows) {
    std::vector<float> levels(rows * k), product(rows * k);
    std::vector<std::vector<double>> m(rows, std::vector<double>(groups * groups)),
        b(rows, std::vector<double>(groups));
    for (int64_t r = 0; r < rows; ++r) row_levels(a.codes + (first + r) * k, k, a.levels, &levels[r * k]);
    dense_gemm(Transpose::kNo, Transpose::kNo, rows, k, k, 1.0f, a.w + first * k, k, a.h, k, 0.0f,
               product.data(), k);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t begin = g * a.group, size = std::min(a.group, k - begin);
      for (int64_t r = 0; r < rows; ++r) b[r][g] = dot(&product[r * k + begin], &levels[r * k + begin], size);
    }
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t begin = g * a.group, size = std::min(a.group, k - begin);
      dense_gemm(Transpose::kNo, Transpose::kNo, rows, k - begin, size, 1.0f, &levels[begin], k,
                 a.h + begin * k + begin, k, 0.0f, &product[begin], k);
      for (int64_t i = g; i < groups; ++i) {
        const int64_t at = i * a.group, width = std::min(a.group, k - at);
        for (int64_t r = 0; r < rows; ++r)
          m[r][i * groups + g] = dot(&product[r * k + at], &levels[r * k + at], width);
      }
    }
    for (int64_t r = 0; r < rows; ++r) refit_row(m[r], b[r], a.scales + (first + r) * groups, groups);
  });
}

void gptq_loss_cpu(const GptqLossArgs& a, Part part) {
  const int64_t k = a.k;
  for_chunks(a.n, kRows, part, [&](int64_t first, int64_t rows) {
    const float* w = a.w + first * k;
    std::vector<float> error(rows * k), error_h(rows * k), weight_h(rows * k);
    for (int64_t i = 0; i < rows * k; ++i) error[i] = w[i] - a.q[first * k + i];
    dense_gemm(Transpose::kNo, Transpose::kNo, rows, k, k, 1.0f, error.data(), k, a.h, k, 0.0f,
               error_h.data(), k);
    dense_gemm(Transpose::kNo, Transpose::kNo, rows, k, k, 1.0f, w, k, a.h, k, 0.0f, weight_h.data(), k);
    for (int64_t r = 0; r < rows; ++r) {
      const float* e = &error[r * k];
      RowSums sums{dot(e, &error_h[r * k], k),   dot(e, e, k), dot(w + r * k, &weight_h[r * k], k),
                   dot(w + r * k, w + r * k, k), 0.0,          0.0f};
      for (int64_t j = 0; j < k; ++j) {
        sums.error_max = std::max(sums.error_max, std::fabs(e[j]));
        sums.error_abs += std::fabs(e[j]);
      }
      a.sums[first + r] = sums;
    }
  });
}

}  // namespace q4s
