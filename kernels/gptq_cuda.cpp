#include "kernels/gptq_cuda.h"

#include <cublas_v2.h>
#include <cusolverDn.h>

#include <cfloat>
#include <functional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "kernels/device_array.h"
#include "kernels/gptq_steps.h"
#include "kernels/split_product.h"

namespace q4s {
namespace {

constexpr float kDifferenceScale = 16;                // a power of two: costs no bits
constexpr int64_t kSystemBytes = int64_t(512) << 20;  // of the refit's systems at a time
constexpr size_t kWorkspace = 32 << 20;               // what the library recommends for this chip
constexpr int64_t kOuterBlock = 1024;                 // columns whose updates beyond it are one product
constexpr int64_t kTogether = 16384;                  // tokens whose statistics are summed at a time
constexpr int64_t kInverseColumns = 1024;             // of the factor's inverse at a time

void check(cublasStatus_t status, const char* what) {
  if (status != CUBLAS_STATUS_SUCCESS)
    throw std::runtime_error(std::string(what) + ": cuBLAS: " + cublasGetStatusString(status));
}
void check(cusolverStatus_t status, const char* what) {
  if (status != CUSOLVER_STATUS_SUCCESS)
    throw std::runtime_error(std::string(what) + ": cuSOLVER: status " + std::to_string(int(status)));
}

cublasOperation_t op(bool transpose) { return transpose ? CUBLAS_OP_T : CUBLAS_OP_N; }

// Cuts the working memory of one call: the steps follow each other, so they share one piece.
class Cut {
 public:
  explicit Cut(DeviceArray<uint8_t>& memory) : memory_(memory) {}
  template <typename T>
  Cut& operator()(T*& pointer, int64_t count) {
    pieces_.push_back([&pointer, at = bytes_](uint8_t* base) { pointer = reinterpret_cast<T*>(base + at); });
    bytes_ += round_up(std::max<int64_t>(count, 1) * int64_t(sizeof(T)), 256);
    return *this;
  }
  Cut& operator()(SplitMatrix& s, int64_t rows, int64_t cols, bool by_column) {
    s.rows = rows, s.cols = cols, s.by_column = by_column;
    return (*this)(s.high, rows * s.ld())(s.low, rows * s.ld())(s.scale, std::max(rows, cols));
  }
  void take() {
    uint8_t* base = memory_.take(bytes_);
    for (const auto& set : pieces_) set(base);
  }

 private:
  DeviceArray<uint8_t>& memory_;
  std::vector<std::function<void(uint8_t*)>> pieces_;
  int64_t bytes_ = 0;
};

}  // namespace

struct GptqCuda::State {
  cudaStream_t stream;
  cublasHandle_t blas = nullptr;
  cusolverDnHandle_t solver = nullptr;
  DeviceArray<uint8_t> memory;     // of the call in progress
  DeviceArray<int> flags;          // (2) bad, info
  DeviceArray<uint8_t> workspace;  // of the library
  // Tokens whose statistics wait for more, in `memory`: each product reads and writes its whole sum.
  struct Pending {
    GptqStatisticsArgs args;  // of the first call
    int64_t tokens = 0, room = 0;
    uint16_t *x, *d, *e;  // (room, K), (room, K), (room, N)
  } pending;

  explicit State(cudaStream_t s) : stream(s) {}
  ~State() {
    if (blas) cublasDestroy(blas);
    if (solver) cusolverDnDestroy(solver);
  }

  // Row-major C (m, n) = alpha op(A) op(B) + beta C: the transpose of the library's.
  void product(bool ta, bool tb, int64_t m, int64_t n, int64_t k, float alpha, const float* a, int64_t lda,
               const float* b, int64_t ldb, float beta, float* c, int64_t ldc) {
    if (m == 0 || n == 0 || k == 0) return;
    check(cublasSgemm(blas, op(tb), op(ta), int(n), int(m), int(k), &alpha, b, int(ldb), a, int(lda), &beta,
                      c, int(ldc)),
          "product");
  }
  // Row-major C (m, n) = A B but for the scales of rows and columns, A (m, k) split by row; B (k, n) split by
  // column, or B^T by row. For the products of whole matrices: f32 ones would be most of the time.
  void scaled_product(const SplitMatrix& a, const SplitMatrix& b, float* c) {
    const bool transposed = !b.by_column;
    const int64_t m = a.rows, k = a.cols, n = transposed ? b.rows : b.cols;
    const auto part = [&](const uint16_t* x, const uint16_t* y, float scale, float keep) {
      check(cublasGemmEx(blas, op(transposed), CUBLAS_OP_N, int(n), int(m), int(k), &scale, y, CUDA_R_16F,
                         int(b.ld()), x, CUDA_R_16F, int(a.ld()), &keep, c, CUDA_R_32F, int(n),
                         CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
            "product");
    };
    part(a.low, b.high, 1 / kSplitLow, 0);
    part(a.high, b.low, 1 / kSplitLow, 1);
    part(a.high, b.high, 1, 1);
  }
  // C = alpha A B + beta add.
  void product(const SplitMatrix& a, const SplitMatrix& b, float alpha, float* c, const float* add = nullptr,
               float beta = 0) {
    scaled_product(a, b, c);
    unsplit_cuda(c, a.scale, b.scale, a.rows, b.by_column ? b.cols : b.rows, alpha, add, beta, stream);
  }
  // The same of f32 operands, each split on the way; whose memory `x` and `y` are.
  void product(const float* a, const SplitMatrix& x, const float* b, const SplitMatrix& y, float alpha,
               float* c, const float* add = nullptr, float beta = 0) {
    split_cuda(a, x, stream);
    split_cuda(b, y, stream);
    product(x, y, alpha, c, add, beta);
  }
  // C (m, n; rows of ldc) += alpha A^T B over t rows of fp16.
  void gram(int64_t m, int64_t n, int64_t t, float alpha, const uint16_t* a, int64_t lda, const uint16_t* b,
            int64_t ldb, float* c, int64_t ldc) {
    const float one = 1;
    check(cublasGemmEx(blas, CUBLAS_OP_N, CUBLAS_OP_T, int(n), int(m), int(t), &alpha, b, CUDA_R_16F,
                       int(ldb), a, CUDA_R_16F, int(lda), &one, c, CUDA_R_32F, int(ldc), CUBLAS_COMPUTE_32F,
                       CUBLAS_GEMM_DEFAULT),
          "sums over tokens");
  }
  // What a walk over x (N, K) works in: what an outer block moved, also as fp16, and what the rest hears of
  // it.
  struct WalkMemory {
    float *moved, *heard;  // (N, kOuterBlock), (N, K)
    SplitMatrix left;      // (N, kOuterBlock)
  };
  // Runs the panels of the GPTQ pass or of a sweep over x, which hears of later columns by products with p.m:
  // those of its outer block in f32 panel by panel, the rest, once for each outer block, by one split
  // product; m is p.m split by column (unless K fits one outer block).
  void walk(GptqPanelArgs p, float* x, const SplitMatrix& m, WalkMemory memory,
            void (*panel)(const GptqPanelArgs&, cudaStream_t)) {
    p.x = x;
    p.moved_stride = kOuterBlock;
    for (int64_t outer = 0; outer < p.k; outer += kOuterBlock) {
      const int64_t width = std::min(kOuterBlock, p.k - outer), end = outer + width, rest = p.k - end;
      for (p.begin = outer; p.begin < end; p.begin += p.size) {
        p.size = std::min(kGptqBlock, end - p.begin);
        p.moved = memory.moved + (p.begin - outer);
        panel(p, stream);
        const int64_t next = p.begin + p.size;
        product(false, false, p.n, end - next, p.size, -1, p.moved, kOuterBlock, p.m + p.begin * p.k + next,
                p.k, 1, x + next, p.k);
      }
      if (rest == 0) break;
      memory.left.rows = p.n, memory.left.cols = width;
      split_cuda(memory.moved, memory.left, stream);
      const SplitMatrix right = m.part(outer, width, end);
      scaled_product(memory.left, right, memory.heard);
      unsplit_add_cuda(memory.heard, memory.left.scale, right.scale, p.n, rest, -1, x + end, p.k, stream);
    }
  }
  // In f32 or f64.
  template <typename T>
  bool factor(const float* h, const int32_t* order, float* u, int64_t k) {
    constexpr bool kDouble = sizeof(T) == 8;
    const auto potrf_size = [&](auto* a, int* size) {
      if constexpr (kDouble)
        return cusolverDnDpotrf_bufferSize(solver, CUBLAS_FILL_MODE_UPPER, int(k), a, int(k), size);
      else
        return cusolverDnSpotrf_bufferSize(solver, CUBLAS_FILL_MODE_UPPER, int(k), a, int(k), size);
    };
    T *a = nullptr, *b = nullptr, *work = nullptr;
    int size = 0;
    check(potrf_size(a, &size), "factor");
    Cut cut(memory);
    cut(a, k * k)(b, k * k)(work, size).take();
    flags.clear(2, stream);
    gptq_factor_begin_cuda(h, order, a, b, k, stream);
    // With rows and columns reversed, a = L L^T and b = L^-1, both row-major lower: the library's upper.
    if constexpr (kDouble)
      check(cusolverDnDpotrf(solver, CUBLAS_FILL_MODE_UPPER, int(k), a, int(k), work, size, flags.get() + 1),
            "factor");
    else
      check(cusolverDnSpotrf(solver, CUBLAS_FILL_MODE_UPPER, int(k), a, int(k), work, size, flags.get() + 1),
            "factor");
    const T one = 1;
    for (int64_t j = 0; j < k;
         j += kInverseColumns) {  // what stands below a column of the inverse stays zero
      const int columns = int(std::min(kInverseColumns, k - j)), rows = int(j) + columns;
      T* to = b + j * k;
      if constexpr (kDouble)
        check(cublasDtrsm(blas, CUBLAS_SIDE_LEFT, CUBLAS_FILL_MODE_UPPER, CUBLAS_OP_N, CUBLAS_DIAG_NON_UNIT,
                          rows, columns, &one, a, int(k), to, int(k)),
              "inverse");
      else
        check(cublasStrsm(blas, CUBLAS_SIDE_LEFT, CUBLAS_FILL_MODE_UPPER, CUBLAS_OP_N, CUBLAS_DIAG_NON_UNIT,
                          rows, columns, &one, a, int(k), to, int(k)),
              "inverse");
    }
    gptq_factor_end_cuda(b, u, flags.get(), k, stream);
    return !flagged();
  }
  bool flagged() {
    int bad[2];
    flags.download(bad, 2, stream);
    return bad[0] != 0 || bad[1] != 0;
  }
};

GptqCuda::GptqCuda(cudaStream_t stream) : s_(std::make_unique<State>(stream)) {
  check(cublasCreate(&s_->blas), "cublasCreate");
  check(cublasSetStream(s_->blas, stream), "cublasSetStream");
  check(cublasSetWorkspace(s_->blas, s_->workspace.take(kWorkspace), kWorkspace), "cublasSetWorkspace");
  check(cublasSetMathMode(
            s_->blas, cublasMath_t(CUBLAS_DEFAULT_MATH | CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION)),
        "cublasSetMathMode");
  check(cusolverDnCreate(&s_->solver), "cusolverDnCreate");
  check(cusolverDnSetStream(s_->solver, stream), "cusolverDnSetStream");
}
GptqCuda::~GptqCuda() = default;

void GptqCuda::statistics(const GptqStatisticsArgs& a) {
  if (a.tokens == 0) return;
  State::Pending& p = s_->pending;
  if (p.tokens + a.tokens > p.room) finish_statistics();
  const int64_t ld = round_up(a.k, 8), ldr = round_up(a.n, 8);
  if (p.tokens == 0) {
    p.args = a;
    p.room = std::max<int64_t>(1, kTogether / a.tokens) * a.tokens;
    Cut(s_->memory)(p.x, p.room * ld)(p.d, a.x_full ? p.room * ld : 0)(p.e, a.r ? p.room * ldr : 0).take();
  }
  gptq_to_half_cuda(a.x, nullptr, 1, a.tokens, a.k, p.x + p.tokens * ld, ld, s_->stream);
  if (a.x_full)
    gptq_to_half_cuda(a.x_full, a.x, kDifferenceScale, a.tokens, a.k, p.d + p.tokens * ld, ld, s_->stream);
  if (a.r)
    gptq_to_half_cuda(a.r_full, a.r, kDifferenceScale, a.tokens, a.n, p.e + p.tokens * ldr, ldr, s_->stream);
  p.tokens += a.tokens;
}

void GptqCuda::finish_statistics() {
  State::Pending& p = s_->pending;
  const GptqStatisticsArgs& a = p.args;
  const int64_t tokens = std::exchange(p.tokens, 0), ld = round_up(a.k, 8), ldr = round_up(a.n, 8);
  p.room = 0;
  if (tokens == 0) return;
  // Panels of rows, each from its diagonal on: wide enough for the library, narrow enough to spare most of
  // the rest.
  const int64_t panel = std::max<int64_t>(1024, round_up(ceil_div(a.k, 8), 128));
  for (int64_t i = 0; i < a.k; i += panel)
    s_->gram(std::min(panel, a.k - i), a.k - i, tokens, a.factor, p.x + i, ld, p.x + i, ld, a.h + i * a.k + i,
             a.k);
  const float factor = a.factor / kDifferenceScale;
  if (a.x_full) s_->gram(a.k, a.k, tokens, factor, p.d, ld, p.x, ld, a.d, a.k);
  if (a.r) s_->gram(a.n, a.k, tokens, factor, p.e, ldr, p.x, ld, a.e, a.k);
}

void GptqCuda::drop_statistics() { s_->pending = {}; }

bool GptqCuda::factor(const float* h, const int32_t* order, float* u, int64_t k, bool exact) {
  return exact ? s_->factor<double>(h, order, u, k) : s_->factor<float>(h, order, u, k);
}

bool GptqCuda::correct(const GptqCorrectArgs& a) {
  const int64_t n = a.n, k = a.k, count = n * k;
  float *p, *q;
  SplitMatrix left, right;
  Cut(s_->memory)(p, count)(q, count)(left, n, k, false)(right, k, k, true).take();
  if (a.d) {
    s_->product(a.w, left, a.d, right, a.alpha, p, a.e, a.beta);
  } else {
    cuda_check(cudaMemcpyAsync(p, a.e, size_t(count) * sizeof(float), cudaMemcpyDeviceToDevice, s_->stream),
               "copy");
    check(cublasSscal(s_->blas, int(count), &a.beta, p, 1), "correction");
  }
  gptq_gather_columns_cuda(p, a.order, q, n, k, false, s_->stream);
  right.by_column = false;
  s_->product(q, left, a.u, right, 1, p);  // by U^T
  right.by_column = true;
  s_->product(p, left, a.u, right, 1, q);
  s_->flags.clear(2, s_->stream);
  gptq_finite_cuda(q, count, FLT_MAX, s_->flags.get(), s_->stream);
  if (s_->flagged()) return false;
  gptq_gather_columns_cuda(q, a.inverse, a.w, n, k, true, s_->stream);
  return true;
}

void GptqCuda::solve(const GptqSolveArgs& a) {
  GptqPanelArgs p{};
  p.m = a.u, p.order = a.order, p.scales = a.scales, p.codes = a.codes;
  p.n = a.n, p.k = a.k, p.group = a.group, p.levels = a.levels;
  const bool outer = a.k > kOuterBlock;
  State::WalkMemory memory;
  SplitMatrix right{};
  Cut cut(s_->memory);
  cut(memory.moved, a.n * kOuterBlock);
  if (outer) cut(memory.heard, a.n * a.k)(memory.left, a.n, kOuterBlock, false)(right, a.k, a.k, true);
  cut.take();
  if (outer) split_cuda(a.u, right, s_->stream);
  s_->walk(p, a.w, right, memory, gptq_solve_panel_cuda);
}

void GptqCuda::sweep(const GptqRefineArgs& a) {
  float *e, *gradient, *moved;
  SplitMatrix left, right;
  Cut cut(s_->memory);
  cut(e, a.n * a.k)(gradient, a.n * a.k)(moved, a.n * kOuterBlock);
  cut(left, a.n, std::max(a.k, kOuterBlock), false)(right, a.k, a.k, true).take();
  left.cols = a.k;
  gptq_error_cuda({a.w, a.scales, a.codes, a.n, a.k, a.group, a.levels}, e, s_->stream);
  s_->product(e, left, a.h, right, 1, gradient);
  GptqPanelArgs p{};
  p.m = a.h, p.scales = a.scales, p.codes = a.codes;
  p.n = a.n, p.k = a.k, p.group = a.group, p.levels = a.levels;
  p.dither = a.dither, p.pass = a.pass;
  s_->walk(p, gradient, right, {moved, e, left}, gptq_sweep_panel_cuda);
}

void GptqCuda::refit(const GptqRefineArgs& a) {
  const int64_t k = a.k, groups = ceil_div(k, a.group), ld = round_up(k, 8);
  const int64_t most = std::clamp<int64_t>(kSystemBytes / (groups * groups * 8), 1, a.n);
  float* product;
  uint16_t* levels;  // each level and its part by kSplitLow, which fp16 holds exactly
  double *m, *b;
  SplitMatrix left, right;
  Cut cut(s_->memory);
  cut(product, most * k)(levels, most * 2 * k)(m, most * groups * groups)(b, most * groups);
  cut(left, most, k, false)(right.high, 2 * k * ld)(right.scale, k).take();
  // Rows of high and of low in turn: with pairs of levels, one product is that of both.
  right.low = right.high + ld;
  right.rows = right.cols = k, right.by_column = true, right.stride = 2 * ld;
  split_cuda(a.h, right, s_->stream);
  for (int64_t row = 0; row < a.n; row += most) {
    const int64_t n = std::min(most, a.n - row);
    gptq_levels_cuda({nullptr, nullptr, a.codes + row * k, n, k, a.group, a.levels}, levels, 1 / kSplitLow,
                     s_->stream);
    left.rows = n;
    split_cuda(a.w + row * k, left, s_->stream);
    s_->product(left, right, 1, product);
    gptq_group_dots_cuda(product, levels, nullptr, b, n, k, a.group, 0, groups, s_->stream);
    for (int64_t g = 0; g < groups; ++g) {  // column g of every system
      const int64_t begin = g * a.group, size = std::min(a.group, k - begin);
      const float one = 1, zero = 0;
      check(cublasGemmEx(s_->blas, CUBLAS_OP_N, CUBLAS_OP_N, int(k - begin), int(n), int(2 * size), &one,
                         right.high + 2 * begin * ld + begin, CUDA_R_16F, int(ld), levels + 2 * begin,
                         CUDA_R_16F, int(2 * k), &zero, product + begin, CUDA_R_32F, int(k),
                         CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
            "refit");
      gptq_group_dots_cuda(product, levels, right.scale, m + g * groups, n, k, a.group, g, groups * groups,
                           s_->stream);
    }
    gptq_refit_rows_cuda(m, b, a.scales + row * groups, n, groups, s_->stream);
  }
}

void GptqCuda::feed_back(const GptqFeedbackArgs& a) {
  const int64_t rest = a.size - a.rank_end, ld = a.blocks * a.k;
  if (rest == 0) return;
  const float minus = -1, one = 1;
  check(cublasSgemmStridedBatched(
            s_->blas, CUBLAS_OP_N, CUBLAS_OP_T, int(a.k), int(rest), int(a.rank_end - a.rank_begin), &minus,
            a.error + a.rank_begin * ld, int(ld), a.k, a.feedback + a.rank_begin * a.size + a.rank_end,
            int(a.size), a.size * a.size, &one, a.target + a.rank_end * ld, int(ld), a.k, int(a.blocks)),
        "feedback");
}

void GptqCuda::losses(const GptqRefineArgs& a, RowSums* sums, bool weights) {
  const int64_t n = a.n, k = a.k;
  float *e, *eh, *wh;
  SplitMatrix left, right;
  Cut cut(s_->memory);
  cut(e, n * k)(eh, n * k)(wh, weights ? n * k : 0)(left, n, k, false)(right, k, k, true).take();
  gptq_error_cuda({a.w, a.scales, a.codes, n, k, a.group, a.levels}, e, s_->stream);
  s_->product(e, left, a.h, right, 1, eh);
  if (weights) {
    split_cuda(a.w, left, s_->stream);
    s_->product(left, right, 1, wh);
  }
  gptq_row_sums_cuda(e, eh, weights ? a.w : nullptr, weights ? wh : nullptr, sums, n, k, s_->stream);
}

void GptqCuda::product(bool ta, bool tb, int64_t m, int64_t n, int64_t k, float alpha, const float* a,
                       int64_t lda, const float* b, int64_t ldb, float beta, float* c, int64_t ldc) {
  s_->product(ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

size_t GptqCuda::bytes() const { return s_->memory.bytes() + s_->workspace.bytes(); }

}  // namespace q4s
