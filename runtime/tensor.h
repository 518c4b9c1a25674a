// A tensor is a node of the graph: the operation that makes it, its sources, and where its rows live once
// planned. All activations are row-major (rows, cols) f32; inputs may be i32. Rows are counted at run time:
// tokens of the step, or rows whose logits are wanted; a graph is planned for the largest counts and run with
// any smaller ones.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

#include "kernels/linear_decode.h"
#include "runtime/weight.h"

namespace q4s {

enum class Op : uint8_t { kInput, kEmbed, kGather, kRmsNorm, kLinear, kRopeKv, kAttention, kSwiglu, kRotate };
constexpr int kOpCount = 9;
const char* op_name(Op);

enum class Type : uint8_t { kF32, kI32 };
enum class Rows : uint8_t { kTokens, kOutputs };

struct Counts {
  int64_t tokens = 0, outputs = 0;
  int64_t reach = 0;   // every position of the step is below it; 0: unknown, then the cache's ctx
  bool apart = false;  // no two tokens of the step belong to one sequence
  int64_t of(Rows r) const { return r == Rows::kTokens ? tokens : outputs; }
};

struct HeadShape {
  int layer = 0;  // which cache layer
  int64_t heads = 0, kv_heads = 0, head_dim = 0;
};

struct Tensor {
  Op op = Op::kInput;
  Type type = Type::kF32;
  Rows rows = Rows::kTokens;
  int64_t cols = 0;
  std::string name;
  std::array<Tensor*, 3> src{};     // activations and positions, in the order of the builder's arguments
  const Weight* weight = nullptr;   // table of embed, gain of rms_norm, matrix of linear, cos/sin of rope_kv
  const Weight* weight2 = nullptr;  // rotate: signs in weight, factor in weight2; cos/sin of a fused rope_kv
  const Weight* gain = nullptr;     // fused linear: rms_norm of src[0] first
  Epilogue epilogue = Epilogue::kNone;  // fused linear; kRopeKv: src is x, position, sequence
  HeadShape head;                       // rope_kv, attention
  float eps = 0;                        // rms_norm, gain
  bool inverse = false;                 // rotate

  bool keep = false;                    // result read by the caller: its rows outlive the step
  int readers = 0;                      // nodes that have it among their sources
  const Tensor* reader = nullptr;       // the last of them
  std::byte* data = nullptr;            // (rows, cols), set by Graph::bind

  const float* f32() const { return reinterpret_cast<const float*>(data); }
  float* f32() { return reinterpret_cast<float*>(data); }
  const int32_t* i32() const { return reinterpret_cast<const int32_t*>(data); }
};

}  // namespace q4s
