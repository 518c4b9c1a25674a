// What rows of logits say of the tokens that really follow, and how far they are from a reference's:
// perplexity and divergence are means of these.
#pragma once
#include <cstdint>

#include "kernels/cuda_stream.h"
#include "kernels/types.h"

namespace q4s {

// All NaN where a logit of the row, or of the reference's, is not finite. Without a reference the rest is 0.
struct LogitScore {
  double nll;        // -log softmax(logits)[target], nats
  double ref_nll;    // the same of the reference's row
  double kl;         // KL(softmax reference || softmax logits)
  int64_t same_top;  // 1 where both rows are largest at the same id, the first of equals
};

struct ScoreLogitsArgs {
  const float* logits;     // (R, V)
  const float* reference;  // (R, V) or null
  const int32_t* target;   // (R), of [0, V)
  LogitScore* score;       // (R)
  int64_t rows, vocab;     // V > 0
};

// Exponentials in f32, sums of them in f64 (at least every 1024 terms): nll is good to 1e-6, kl to about 1e-6
// of the mean difference of two logits. A row's result does not depend on the others.
void score_logits(const ScoreLogitsArgs&, Part = {});
// Rows in device memory; target and score where the device reaches them, pinned host memory too.
void score_logits_cuda(const ScoreLogitsArgs&, cudaStream_t);

}  // namespace q4s
