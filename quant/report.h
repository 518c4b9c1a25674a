// What a quantisation leaves behind: per block and projection the losses and the shape of the weights. JSON
// with stable keys; the same text, block by block, is the note that a resumed run finds.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "quant/solver.h"

namespace q4s {

// Moments and histogram of a projection's weights, with the normal fit (mean, sd) that the plots draw.
struct WeightShape {
  double mean = 0, sd = 0, skew = 0, kurtosis = 0;  // kurtosis 3: normal
  double low = 0, high = 0;
  std::vector<int64_t> histogram;  // 64 equal bins over mean +- 4 sd; the ends take what lies beyond
};
WeightShape weight_shape(const float* w, int64_t count, const Team&);

struct LinearReport {
  std::string name;  // q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj
  int64_t n = 0, k = 0, group = 0;
  int bits = 4;
  std::string grid;
  LossSummary loss{};
  double damp = 0;
  int sweeps = 0;
  double seconds = 0;    // of its stacked linear
  std::string fallback;  // empty: none
  WeightShape weights;
};

struct BlockReport {
  int64_t block = 0;
  std::vector<LinearReport> linears;
  double output_error =
      0;  // |x_full - x|^2 / |x_full|^2 of the residual stream after the block; 0: not measured
  double seconds = 0;
};

struct Report {
  std::vector<BlockReport> blocks;
  double bits_per_weight = 0;  // of the blocks' linears, scales included
  int64_t size_bytes = 0;      // of the file
  std::string options;         // JSON object
  std::string calibration;     // JSON object
  std::string effects = "{}";  // JSON object by tensor: KL with that linear alone rounded; --bpw only
  std::vector<std::pair<std::string, double>> stages;  // seconds
  int64_t peak_bytes = 0;                              // resident, as the system counts it
};

std::string to_json(const BlockReport&);
BlockReport block_report(const std::string& json);  // the inverse
std::string to_json(const Report&);

int64_t peak_resident_bytes();

}  // namespace q4s
