// Runs one block in the pieces that lie between its four linears' inputs, on chunks of whole sequences. The
// pieces are small graphs of the engine, so a backend's kernels serve the quantiser too. Activations are
// backend memory of the caller; nothing is copied.
#pragma once
#include <memory>
#include <vector>

#include "models/llama.h"
#include "quant/block.h"
#include "runtime/backend.h"

namespace q4s {

class BlockRunner {
 public:
  // chunk: tokens of a call at most, whole sequences of seq_len. `rope` must outlive the runner.
  BlockRunner(const LlamaConfig&, Backend&, const Weight& rope, int64_t seq_len, int64_t chunk);
  ~BlockRunner();
  BlockRunner(const BlockRunner&) = delete;
  BlockRunner& operator=(const BlockRunner&) = delete;

  // The weights of the block to run from now on; the first replaces all six.
  void set(BlockWeights);
  void set_qkv(std::vector<float>);
  void set_o(std::vector<float>);
  void set_gate_up(std::vector<float>);
  void set_down(std::vector<float>);

  // tokens: of whole sequences from position 0, at most `chunk`. x is the residual stream (T, D).
  void attn_input(const float* x, float* y, int64_t tokens);     // y (T, D) = norm(x): input of qkv
  void attention(const float* x, float* y, int64_t tokens);      // y (T, H hd): input of o
  void add_attention(const float* a, float* x, int64_t tokens);  // x += Wo a
  void mlp_input(const float* x, float* y, int64_t tokens);      // y (T, D) = norm(x): input of gate and up
  void mlp(const float* x, float* y, int64_t tokens);            // y (T, F): input of down
  void add_mlp(const float* a, float* x, int64_t tokens);        // x += Wdown a

  size_t bytes() const;  // of arenas, cache and scratch

 private:
  struct Piece;
  void run(Piece&, const float* x, float* residual, float* y, int64_t tokens);
  void load(Weight&, std::vector<float>);

  Backend& backend_;
  int64_t seq_len_;
  LlamaBlock block_;
  std::vector<std::unique_ptr<Piece>> pieces_;
  std::vector<int32_t> position_, sequence_;  // (chunk)
  KvCache kv_;
  size_t arena_bytes_ = 0, scratch_bytes_ = 0;
  std::byte* arena_ = nullptr;
  std::byte* scratch_ = nullptr;
};

}  // namespace q4s
