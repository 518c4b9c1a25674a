// A block as the quantiser sees it: four linears, each the unit of a Hessian, of a group and of a number of
// bits in the file. And its weights as f32 in host memory.
#pragma once
#include <string>
#include <vector>

#include "models/llama.h"
#include "quant/factor.h"

namespace q4s {

enum class Unit { kQkv, kO, kGateUp, kDown };
constexpr Unit kUnits[] = {Unit::kQkv, Unit::kO, Unit::kGateUp, Unit::kDown};
std::string unit_name(int64_t block, Unit);  // "blk.3.qkv", the tensor's name
int64_t unit_rows(const LlamaConfig&, Unit);
int64_t unit_columns(const LlamaConfig&, Unit);
Weight& unit_weight(LlamaBlock&, Unit);
const Weight& unit_weight(const LlamaBlock&, Unit);
inline bool writes_residual(Unit u) { return u == Unit::kO || u == Unit::kDown; }

// The seven projections of a block as rows of its units.
struct Projection {
  const char* name;
  Unit unit;
  int64_t begin, end;  // rows
};
std::vector<Projection> projections(const LlamaConfig&);

// The gains of a block's two norms (D).
struct BlockNorms {
  std::vector<float> attn, mlp;
};
BlockNorms block_norms(const LlamaBlock&, const Team& team);

// Rows of w as f32. Throws Error(kInput) naming the tensor and the count where values are not finite or so
// large that their groups' scales would pass fp16.
std::vector<float> unpack_rows(const Weight& w, int64_t begin, int64_t end, const Team& team);
std::vector<float> unpack(const Weight& w, const Team& team);
// Only that check, and `to`'s rows where it is not null.
void unpack_rows(const Weight& w, int64_t begin, int64_t end, float* to, const Team& team);

}  // namespace q4s
