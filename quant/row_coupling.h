// Rows of a linear whose output errors count together. GPTQ treats the rows of W as independent, which they
// are as long as a unit of error costs the same in every direction of the output. Where it does not (queries
// and keys, whose errors matter along the directions in which keys and queries differ; the last block's
// output, of which the logits see few directions), a row decided later can make up for the errors of the rows
// before it, as a later column does in GPTQ: for the loss tr(M E H E^T), E = W - Q, and M = U^-1 U^-T the
// target of the rest moves by
// -(U_bb^-1 U_b,rest)^T E_b after rows b. (Both-sided metrics: YAQA, arXiv 2505.22988; here M is a closed
// form of the forward pass, quant/output_metric.h.)
#pragma once
#include <cstdint>
#include <functional>
#include <vector>

#include "quant/factor.h"

namespace q4s {

// `blocks` blocks of `size` consecutive rows at the head of a linear's N rows, one metric each; the rest is
// free. Rows are decided in steps: the free ones with the first, then of every block the next size / 8, most
// important rows first.
struct RowCoupling {
  int64_t blocks = 0, size = 0;
  std::vector<int32_t>
      rows;  // (N) the linear's row at each place: free rows, then rank by rank a row of each block
  std::vector<float>
      feedback;  // (blocks, size, size) [i][j]: what an error of rank i takes off the target of rank j

  struct Step {
    int64_t begin, end;  // places
    int64_t rank_begin, rank_end;
  };
  int64_t free_rows() const { return int64_t(rows.size()) - blocks * size; }
  std::vector<Step> steps() const;
};

// metric (blocks, size, size): symmetric, positive semidefinite, of any scale each. Damped by a tenth of the
// mean diagonal. Empty (no blocks) where a metric cannot be factored.
// `factor` serves where there is one block: factor_hessian() with act-order, or a device's.
using MetricFactor = std::function<HessianFactor(std::vector<float> h, int64_t k, double damp)>;
RowCoupling couple_rows(const std::vector<float>& metric, int64_t blocks, int64_t size, int64_t n,
                        const Team&, const MetricFactor& factor = nullptr);

}  // namespace q4s
