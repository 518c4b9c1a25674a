// Builds the nodes of a model, checks their shapes, and plans where they live. A graph is built once for its
// largest counts, bound to an arena, and run any number of times by a Backend. Knows operations, not models.
#pragma once
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "runtime/tensor.h"

namespace q4s {

class Graph {
 public:
  explicit Graph(Counts max) : max_(max) {}

  Tensor& input(std::string name, Rows rows, int64_t cols, Type type);
  Tensor& embed(Tensor& ids, const Weight& table);
  Tensor& gather(Tensor& x,
                 Tensor& index);  // rows of x named by index (outputs): the rows whose logits are wanted
  Tensor& rms_norm(Tensor& x, const Weight& gain, float eps);
  Tensor& linear(Tensor& x, const Weight& w, Tensor* residual = nullptr);
  // qkv (T, (H + 2 Hkv) hd) -> q (T, H hd); appends k and v to the cache.
  Tensor& rope_kv(Tensor& qkv, const Weight& table, Tensor& position, Tensor& sequence, HeadShape);
  Tensor& attention(Tensor& q, Tensor& position, Tensor& sequence, HeadShape);
  Tensor& swiglu(Tensor& gate_up);
  Tensor& rotate(Tensor& x, const Weight& signs, const Weight& factor, bool inverse);

  // Fused forms of rms_norm -> linear -> (nothing | swiglu | rope_kv), for a backend that asks for them
  // (Backend::fuses). The same result, fewer passes; an observer then sees fewer nodes.
  Tensor& norm_linear(Tensor& x, const Weight& gain, float eps, const Weight& w);
  Tensor& norm_linear_swiglu(Tensor& x, const Weight& gain, float eps, const Weight& gate_up);
  Tensor& norm_linear_rope_kv(Tensor& x, const Weight& gain, float eps, const Weight& qkv,
                              const Weight& table, Tensor& position, Tensor& sequence, HeadShape);

  Counts max() const { return max_; }
  std::span<const std::unique_ptr<Tensor>> nodes() const { return nodes_; }  // in order of execution
  Tensor* find(std::string_view name) const;                                 // null where there is none

  // Bytes of arena for the largest counts. Inputs and kept tensors live through the whole step.
  size_t plan();
  // Points every tensor into the arena (kArenaAlign-aligned, plan() bytes).
  void bind(std::byte* arena);

 private:
  Tensor& add(Op op, std::string name, Rows rows, int64_t cols, std::initializer_list<Tensor*> src);

  Counts max_;
  std::vector<std::unique_ptr<Tensor>> nodes_;
  std::vector<size_t> offsets_;
};

}  // namespace q4s
