// Runs one block in the pieces that lie between its four linears' inputs, on chunks of whole sequences. The
// pieces are small graphs of the engine, so a backend's kernels serve the quantiser too. Activations are
// backend memory of the caller; nothing is copied.
#pragma once
#include <memory>
#include <vector>

#include "models/llama.h"
#include "quant/buffer.h"
#include "quant/weight_work.h"
#include "runtime/backend.h"

namespace q4s {

class BlockRunner {
 public:
  // chunk: tokens of a call at most, whole sequences of seq_len. `rope` and `work` must outlive the runner.
  // Two runners of one shape may share their working memory.
  BlockRunner(const LlamaConfig&, Backend&, WeightWork& work, const Weight& rope, int64_t seq_len,
              int64_t chunk, const BlockRunner* share = nullptr);
  ~BlockRunner();

  // What the block computes with from now on; each stays until replaced.
  void set_norms(const BlockNorms&);
  void set(Unit, const float* w);  // (N, K) in backend memory
  void set(const LlamaBlock&);     // all of it, as in the file

  // tokens: of whole sequences from position 0, at most `chunk`. x is the residual stream (T, D).
  void attn_input(const float* x, float* y, int64_t tokens);     // y (T, D) = norm(x): input of qkv
  void attention(const float* x, float* y, int64_t tokens);      // y (T, H hd): input of o
  void add_attention(const float* a, float* x, int64_t tokens);  // x += Wo a
  void mlp_input(const float* x, float* y, int64_t tokens);      // y (T, D) = norm(x): input of gate and up
  void mlp(const float* x, float* y, int64_t tokens);            // y (T, F): input of down
  void add_mlp(const float* a, float* x, int64_t tokens);        // x += Wdown a

 private:
  struct Piece;
  void run(Piece&, const float* x, float* residual, float* y, int64_t tokens);
  void set_gain(Weight&, const std::vector<float>&);

  const LlamaConfig& config_;
  Backend& backend_;
  WeightWork& work_;
  int64_t seq_len_;
  LlamaBlock block_;
  std::vector<std::unique_ptr<Piece>> pieces_;
  std::vector<int32_t> position_, sequence_;  // (chunk)
  struct Memory {
    Buffer kv, arena, scratch;
  };
  std::shared_ptr<Memory> memory_;
  KvCache kv_;
};

}  // namespace q4s
