// The definition of linear.h, and the choice among its fast paths (cpu_kernels.h). Threads take whole rows,
// so that no sum depends on their number.
#include "kernels/linear.h"

#include <vector>

#include "kernels/cpu_kernels.h"

namespace q4s {
namespace {

constexpr int64_t kGrain = 32, kRowGrain = 16;  // rows; multiples of what the kernels take at a time

int64_t row_scratch(const WeightView& w) { return round_up(w.k * 4, 64); }

bool exact_activations = false;

enum class Path { kDot, kVector, kMatrix, kDense };

// By shape and the setting only, never by the number of threads.
Path path_of(const WeightView& w, int64_t tokens) {
  constexpr int64_t kFew = 4;
  const bool ours = w.format == Format::kQ4 || w.format == Format::kQ8;
  const bool groups = w.group == 32 || w.group == 64 || w.group % 128 == 0 || w.group >= w.k;
  if (ours && groups && !exact_activations) return tokens <= kFew ? Path::kVector : Path::kMatrix;
  return tokens <= kFew ? Path::kDot : Path::kDense;
}

// The first bytes that a thread will read of w, into its second cache: the memory does not idle while
// activations are made ready and threads meet. gemv asks for the rest as it goes.
void fetch_start(const WeightView& w, Part part) {
  constexpr int64_t kBytes = 12288;
  const auto [begin, end] = part.of(w.n, kRowGrain);
  if (begin == end) return;
  const uint8_t* p = w.row(begin);
  const int64_t bytes = std::min(kBytes, (end - begin) * row_bytes(w.format, w.k));
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
}

}  // namespace

void set_exact_activations(bool exact) { exact_activations = exact; }

void linear_cpu(const LinearArgs& a, Part part) {
  const int64_t n = a.w.n, k = a.w.k;
  std::vector<float> row(k);
  const auto [begin, end] = part.of(n);
  for (int64_t i = begin; i < end; ++i) {
    dequantize_rows(a.w, i, i + 1, row.data());
    for (int64_t t = 0; t < a.tokens; ++t) {
      double sum = a.residual ? a.residual[t * n + i] : 0;
      for (int64_t j = 0; j < k; ++j) sum += double(row[j]) * a.x[t * k + j];
      a.y[t * n + i] = float(sum);
    }
  }
}

size_t linear_scratch_bytes(const WeightView& w, int64_t tokens, int threads) {
  const CpuKernels& kernels = cpu_kernels();
  switch (path_of(w, tokens)) {
    case Path::kDot: return size_t(row_scratch(w)) * size_t(threads);
    case Path::kVector: return size_t(kernels.token_bytes(w.k) * tokens);
    case Path::kMatrix:
      return size_t(kernels.tile_bytes(w.k) * ceil_div(tokens, kernels.tile) +
                    kernels.panel_bytes(w) * threads);
    case Path::kDense:
      return size_t(kernels.dense_tile_bytes(w.k) * ceil_div(tokens, kernels.tile) +
                    round_up(kernels.dense_panel_bytes(w.k), 64) * threads);
  }
  return 0;
}

void linear_prepare(const LinearArgs& a, Part part) {
  const CpuKernels& kernels = cpu_kernels();
  const Path path = path_of(a.w, a.tokens);
  if (path == Path::kVector) {
    fetch_start(a.w, part);
    constexpr int64_t kColumns = 1024;  // a piece of one token's row
    const int64_t pieces = ceil_div(a.w.k, kColumns);
    const auto [begin, end] = part.of(a.tokens * pieces);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t column = i % pieces * kColumns;
      kernels.quantize(a, i / pieces, column, std::min(a.w.k, column + kColumns));
    }
  }
  if (path == Path::kMatrix || path == Path::kDense) {
    const auto [begin, end] = part.of(ceil_div(a.tokens, kernels.tile));
    (path == Path::kMatrix ? kernels.quantize_tiles : kernels.pack_tiles)(a, begin, end);
  }
}

void linear(const LinearArgs& a, Part part) {
  const CpuKernels& kernels = cpu_kernels();
  const int64_t n = a.w.n;
  switch (path_of(a.w, a.tokens)) {
    case Path::kDot: {
      const auto [begin, end] = part.of(n, 16);
      LinearArgs own = a;
      own.scratch += row_scratch(a.w) * part.index;
      return kernels.dot_rows(own, begin, end);
    }
    case Path::kVector: {
      const auto [begin, end] = part.of(n, kRowGrain);
      return kernels.gemv(a, begin, end);
    }
    case Path::kMatrix: {
      const auto [begin, end] = part.of(n, 16);
      std::byte* panel = a.scratch + kernels.tile_bytes(a.w.k) * ceil_div(a.tokens, kernels.tile);
      return kernels.gemm(a, begin, end, panel + kernels.panel_bytes(a.w) * part.index);
    }
    case Path::kDense: {
      const auto [begin, end] = part.of(n, kGrain);
      std::byte* panel = a.scratch + kernels.dense_tile_bytes(a.w.k) * ceil_div(a.tokens, kernels.tile);
      return kernels.dense_gemm(a, begin, end,
                                panel + round_up(kernels.dense_panel_bytes(a.w.k), 64) * part.index);
    }
  }
}

}  // namespace q4s
