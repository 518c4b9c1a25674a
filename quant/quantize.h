// Quantises a model block by block: every linear sees the inputs that the quantised model so far gives it,
// and is drawn towards what the full-precision model would have seen. Knows no files: what it makes is handed
// to a sink.
#pragma once
#include <functional>
#include <optional>
#include <regex>
#include <string>
#include <utility>
#include <vector>

#include "quant/calibration.h"
#include "quant/pack.h"
#include "quant/report.h"
#include "quant/unit_solver.h"

namespace q4s {

struct Format4 {  // grid and group of one linear
  GridKind grid = GridKind::kSigned;
  int64_t group = 128;  // 0: the whole row
};

struct QuantizeOptions {
  SolveOptions solve;  // grid and group for all but `special`
  double damp = 0.05;
  bool act_order = true;
  bool rotate = true;
  bool order_hidden = true;  // quant/hidden_order.h
  bool couple = true;        // quant/couple.h; only with a correction, which keeps full-precision activations
  bool seed_method = false;  // quant/seed.h instead of our stack; analysis only
  Format head = Format::kQ8;             // of embedding and head: kF16, kQ8, kQ4
  uint64_t seed = 0;                     // of the rotation
  int64_t most_held = int64_t(3) << 30;  // bytes of one unit's inputs that are kept rather than made again
  std::optional<std::regex> only;        // linears whose name does not match stay as they are, in fp16
  std::vector<std::pair<std::regex, Format4>> special;  // the first match counts

  bool corrects() const { return !solve.rtn && !seed_method && (solve.alpha != 0 || solve.beta != 0); }
  Format4 format_of(const std::string& name) const;
  bool covers(const std::string& name) const { return !only || std::regex_search(name, *only); }
};

// What a unit became: packed, or for the analysis-only methods its values (N, K).
struct UnitResult {
  PackedWeight packed;
  std::vector<float> values;
};

// A unit just solved, with what it was solved from: for those who want to try something else on it.
struct SolvedUnit {
  int64_t block;
  Unit unit;
  int64_t n, k;
  float* w;  // (N, K) in the backend's memory
  Backend& backend;
  UnitSolver& solver;  // holds its statistics and factor
  const SolveOptions& options;
  const UnitResult& result;
  const std::vector<RowLoss>& rows;
};

struct QuantizeSink {
  // Of a block that an earlier run finished: its packed units are asked for, not solved again. Null: none.
  std::function<std::optional<WeightView>(int64_t block, Unit)> kept;
  std::function<void(int64_t block, Unit, UnitResult&)> unit;
  std::function<void(const SolvedUnit&)> solved;  // before `unit`, where there is a calibration; optional
  // Norm gains (1 after folding) and the end of a block; not called for kept blocks.
  std::function<void(int64_t block, const BlockNorms& norms, const BlockReport&)> block_done;
  std::function<void(int64_t done, int64_t total)> progress;  // units
  std::function<void(const std::string& stage, double seconds)>
      stage;  // where the time went, at the end; optional
};

// The tables of the model as they go into the file; config.rotated says whether the rotation has to be
// stored.
struct QuantizedFrame {
  LlamaConfig config;
  PackedWeight embed, head;       // head empty where tied
  std::vector<float> final_norm;  // (D)
  Rotation rotation;              // R1; dim 0: none
};
QuantizedFrame quantize_frame(const LlamaModel&, const QuantizeOptions&, const Team&);

// Walks over the blocks. Without calibration (plain rounding only) losses are measured with H = I.
void quantize_blocks(LlamaModel&, Backend&, const QuantizedFrame&, const Calibration*, const QuantizeOptions&,
                     const QuantizeSink&);

// How the walk cuts the tokens: those of a step (enough to fill the device; whole sequences; a fixed rule of
// the shape), and of how many, whole steps from the first on, the inputs of o and of down are held until the
// quantised stream moves on. The others' are made again, which gives the same. One memory serves both.
struct WalkShape {
  int64_t chunk;
  int64_t held_o, held_down;  // tokens
  int64_t held_bytes;
};
WalkShape walk_shape(const LlamaConfig&, const QuantizeOptions&, int64_t samples, int64_t seq_len, bool gpu);

// Bytes of backend memory that quantize_blocks takes, beside the mapped model.
struct QuantizePlan {
  int64_t weights, hessian, working, activations, forward;
  int64_t total() const { return weights + hessian + working + activations + forward; }
};
QuantizePlan plan_quantize(const LlamaConfig&, const QuantizeOptions&, int64_t samples, int64_t seq_len,
                           bool gpu);
// Floating-point operations of the whole, without attention.
double quantize_flops(const LlamaConfig&, const QuantizeOptions&, int64_t samples, int64_t seq_len,
                      bool self_written);

// Reads every weight once; throws Error(kInput) as unpack_rows does. tick() is called between tensors.
void check_weights(const LlamaModel&, const Team&, const std::function<void()>& tick);

}  // namespace q4s
