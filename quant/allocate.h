// Where finer groups or eight bits pay: candidates of every linear solved from the same full-precision
// weights and the same statistics, the effect of each linear on the model's output measured, and a choice
// under a budget.
#pragma once
#include <functional>
#include <vector>

#include "quant/quantize.h"

namespace q4s {

struct Candidate {
  Format4 format;
  int64_t bytes = 0;  // codes and scales
  double loss = 0;    // absolute, the seed's
  double target = 0;  // LossSummary::target
};

struct UnitChoices {
  int64_t block = 0;
  Unit unit = Unit::kQkv;
  double effect = 1;  // KL of the model's output per unit of this linear's relative output error
  double alone = 0;   // KL with this linear alone quantised, as measured
  std::vector<Candidate> candidates;  // [0]: what the options say; then finer and finer
  int chosen = 0;

  double damage(int i) const { return effect * candidates.at(i).target; }
};

int64_t format_bytes(int64_t n, int64_t k, const Format4&);

// One pass over the model that solves g64, g32 and int8 beside the format of the options. Nothing is saved.
std::vector<UnitChoices> try_formats(LlamaModel&, Backend&, const QuantizedFrame&, const Calibration&,
                                     const QuantizeOptions&,
                                     const std::function<void(int64_t, int64_t)>& progress);

// Fills `alone` and `effect`: for every linear, the mean KL of the model with that linear alone quantised by
// GPTQ (signed, groups of 128), over the relative error this makes in the linear's own output. On the first
// calibration sequences. GPTQ and not rounding, since the effect hangs on where the error lies: plain
// rounding errs most along the strongest inputs, which makes qkv look twice as sensitive as it then is. With
// the coupling of rows where `coupled`.
void measure_effects(LlamaModel&, Backend&, const Calibration&, std::vector<UnitChoices>&, bool coupled,
                     const std::function<void(int64_t, int64_t)>& progress);

// The seed's ladder, right: the `count` linears of the largest absolute loss take the first finer format that
// halves it (the finest if none does).
void choose_worst(std::vector<UnitChoices>&, int64_t count);

// Steps along every linear's lower convex hull, best damage saved per byte first, while the blocks stay
// within bits_per_weight. Throws Error(kUsage) when not even the coarsest fits.
void choose_by_budget(std::vector<UnitChoices>&, const LlamaConfig&, double bits_per_weight);

}  // namespace q4s
