// What a run of llama-quant is going to need, said before it starts.
#pragma once
#include "quant/quantize.h"

namespace q4s {

// Bits per weight of the blocks' linears, scales included.
double planned_bits(const LlamaConfig&, const QuantizeOptions&);

// Logs sizes, memory on either kind of device and work. samples 0: no calibration.
void show_plan(const LlamaModel&, const QuantizeOptions&, int64_t samples, int64_t seq_len,
               bool self_written);

// Throws Error(kResource) with the plan where the device is known to have less.
void require_memory(const LlamaModel&, const Backend&, const QuantizeOptions&, int64_t samples,
                    int64_t seq_len);

}  // namespace q4s
