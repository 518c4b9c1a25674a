// The order of a block's hidden channels. Any order is the same function: rows of gate and up and columns of
// down move together. Sorted by the size of down's columns, a group of down holds columns of like size, and
// its one scale serves them all; that costs nothing when the model runs.
#pragma once
#include <cstdint>
#include <vector>

#include "quant/block.h"
#include "quant/weight_work.h"

namespace q4s {

// Channels (F) by descending norm of their column in down (D, F), which lies in the memory of `work`; equal
// ones as they stood. The same on every device and for any number of threads.
std::vector<int32_t> hidden_order(WeightWork& work, const float* down, int64_t n, int64_t k);

// w, the unit's weights (N, K) in the memory of `work`, in that order: gate's and up's rows or down's
// columns.
void order_hidden(WeightWork& work, const LlamaConfig&, Unit, float* w, const std::vector<int32_t>& order);

}  // namespace q4s
