// What a quantisation leaves behind: per block and projection the losses and the shape of the weights. JSON
// with stable keys; the same text, block by block, is the note that a resumed run finds.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "quant/solver.h"
#include "quant/weight_shape.h"
#include "runtime/backend.h"

namespace q4s {

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

// The most memory seen at the moments asked for.
struct MemoryPeak {
  int64_t host = 0;    // resident, without the pages of mapped files
  int64_t device = 0;  // 0 on the CPU
  void note(const Backend&);
};

struct Report {
  std::vector<BlockReport> blocks;
  double bits_per_weight = 0;  // of the blocks' linears, scales included
  int64_t size_bytes = 0;      // of the file
  std::string options;         // JSON object
  std::string calibration;     // JSON object
  std::string effects = "{}";  // JSON object by tensor: KL with that linear alone quantised; --bpw only
  std::vector<std::pair<std::string, double>> stages;  // seconds
  MemoryPeak peak;
};

std::string to_json(const BlockReport&);
BlockReport block_report(const std::string& json);  // the inverse
std::string to_json(const Report&);

}  // namespace q4s
