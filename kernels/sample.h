// Draws the next token from a row of logits, on the device: penalties, then greedy, or temperature with top-k, top-p
// and min-p and one number of a counter-based generator (kernels/philox.h). The host's definition of the same steps
// is runtime/sampler.h; here only what decoding needs between two steps.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/types.h"

namespace q4s {

struct SampleParams {
  float temperature = 0;  // 0: greedy, ties to the lowest id
  int32_t top_k = 0;      // 0: all
  float top_p = 1;        // 1: all
  float min_p = 0;        // 0: all
  float repeat_penalty = 1;
  float presence_penalty = 0, frequency_penalty = 0;
  int32_t repeat_last_n = 0;  // tokens that the penalties look back on
};

}  // namespace q4s
