// The error analysis that this project started from, done so that it can be believed: several versions of the
// quantiser on one calibration, each with its losses and with what it does to the model's output. Models are
// kept in memory in f32; nothing is saved.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "models/perplexity.h"
#include "quant/quantize.h"

namespace q4s {

// The model as a walk leaves it, in f32.
class AnalysisModel {
 public:
  AnalysisModel(const LlamaModel& source, const QuantizedFrame& frame);  // both must outlive it
  void set(int64_t block, Unit, std::vector<float> values);
  // Rows [begin, end) of a unit.
  void set_rows(int64_t block, Unit, int64_t begin, const std::vector<float>& values);
  void set_norms(int64_t block, const BlockNorms&);
  LlamaModel& model() { return model_; }

 private:
  Weight& unit(int64_t block, Unit);
  LlamaModel model_;
};

struct VersionResult {
  std::string name;
  double bits = 0;  // a weight of the blocks, scales (and zero points) included
  std::vector<BlockReport> blocks;
  double largest = 0, sum = 0;  // of the absolute losses, against the full-precision weights
  std::string at;               // where the largest is
  double logged = 0;            // the largest loss as the seed's program would have printed it; 0: the same
  PplResult output;
};

// Versions: the seed's asymmetric baseline, -7..7, -8..7 and half step, -7..7 with observe on `observe`
// projections as the seed wrote it (re-quantising what is quantised) and done right, and our stack with
// `ours`. Each is handed to `done` when it is measured.
void compare_grids(LlamaModel&, Backend&, const Calibration&, const PplText&, const QuantizeOptions& ours,
                   int64_t observe, const std::function<void(const VersionResult&)>& done,
                   const std::function<void(const std::string&, int64_t, int64_t)>& progress);

std::string table_head();
std::string table_row(const VersionResult&);  // markdown
std::string to_json(const std::vector<VersionResult>&);

}  // namespace q4s
