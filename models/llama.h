// LLaMA: its weights by name and its graph. One builder for generation (all blocks) and for GPTQ (one block).
//
//   x = embed[token]                                        (rotated model with a tied embedding: x = x R)
//   per block:  x += Wo attention(rope(Wqkv norm(x)));  x += Wdown swiglu(Wgate_up norm(x))
//   logits = head norm(x)                                   (rotated and tied: x = x R^T first)
//
// wq|wk|wv and gate|up are stacked: one linear each.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "models/config.h"
#include "runtime/graph.h"

namespace q4s {

class Tokenizer;

struct LlamaBlock {
  Weight attn_norm;  // (D)
  Weight qkv;        // (H hd + 2 Hkv hd, D)
  Weight o;          // (D, H hd)
  Weight mlp_norm;   // (D)
  Weight gate_up;    // (2F, D)
  Weight down;       // (D, F)
};

// Says which rows of qkv and gate_up meet in one result (runtime/weight.h).
void set_row_roles(LlamaBlock&, const LlamaConfig&);

struct LlamaWeights {
  Weight embed;  // (V, D)
  std::vector<LlamaBlock> blocks;
  Weight final_norm;  // (D)
  Weight head;        // (V, D); empty where tied: the graph then uses embed
  Weight rope;        // (ctx, hd) cos|sin pairs, made by fill_rope for the context in use
  Weight rotation_signs, rotation_factor;  // (D), (m, m); rotated models only

  const Weight& output() const { return head.view.n ? head : embed; }
  void mark_head() { (head.view.n ? head : embed).head = true; }
  int64_t read_bytes_per_token() const;  // blocks and head: what decoding one token streams
};

struct Inputs {
  Tensor* token = nullptr;     // (T) i32; null where the range does not embed
  Tensor* x = nullptr;         // (T, D) where the range starts past 0
  Tensor* position = nullptr;  // (T) i32
  Tensor* sequence = nullptr;  // (T) i32
  Tensor* wanted = nullptr;    // (R) i32: rows of the step whose logits are computed; only with a head
};

struct Range {
  int64_t first, last;  // blocks [first, last)
};

// Adds the nodes of a range. embed iff first == 0, head iff last == layers. Fills `in`. Returns the
// last node, marked keep: logits (R, V) or the residual stream (T, D). Cache layer l of the graph is block
// first+l. fused: for a backend that asks for it (Backend::fuses), when no observer wants to see the inputs
// of each linear.
Tensor& build_llama(Graph&, const LlamaConfig&, const LlamaWeights&, Inputs& in, Range r, bool fused = false);

// A model ready to be run or quantised: everything is mapped, nothing unpacked. Opened from a Hugging Face
// folder, a GGUF file or a .q4s file, recognised by content.
struct LlamaModel {
  std::string path, kind;  // kind: "hf", "gguf", "q4s", "random"
  LlamaConfig config;
  LlamaWeights weights;
  std::shared_ptr<const Tokenizer> tokenizer;      // null for random weights
  std::string provenance;                          // JSON text of a .q4s, else empty
  std::vector<std::shared_ptr<const void>> files;  // keep mapped files alive

  bool packed() const { return weights.blocks.at(0).o.view.format == Format::kQ4; }
  int64_t weight_bytes() const;
};

// Throws Error(kInput): missing, extra and misshapen tensors are listed all at once.
LlamaModel open_llama(const std::string& path);

// Random weights of a shape, seeded: linears kF32, kF16 or kQ4 (groups of `group`), embedding and head
// likewise or kQ8 (groups of 64). No tokenizer. Throws Error(kUsage) for other formats.
LlamaModel random_llama(const LlamaConfig&, uint64_t seed, Format linears, int64_t group, Format head);

void fill_rope(LlamaModel&, int64_t ctx);

std::vector<Weight*> all_weights(LlamaWeights&);  // that there are
void unload(LlamaModel&);                         // drops what a backend loaded

}  // namespace q4s
