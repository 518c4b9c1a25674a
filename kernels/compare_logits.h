// Two rows of logits against each other: what perplexity and divergence are made of.
#pragma once
#include <cstdint>

namespace q4s {

struct LogitComparison {
  double lse_p, lse_q;   // log of the sum of exponentials
  double kl;             // KL(softmax p || softmax q), without forming either
  int64_t top_p, top_q;  // the largest; the first of equals
};

// p, q (n), n > 0, finite. Exponentials in f32 (2e-7 relative), sums of them in f64 every 1024: kl is good to
// about 1e-6 of the mean |p - q|.
LogitComparison compare_logits(const float* p, const float* q, int64_t n);

}  // namespace q4s
