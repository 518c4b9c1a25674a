#include "models/llama.h"

namespace q4s {

namespace {

// x += Wo attention(rope(Wqkv norm(x)));  x += Wdown swiglu(Wgate_up norm(x))
Tensor* add_block(Graph& g, const LlamaConfig& c, const LlamaBlock& b, const Weight& rope, const Inputs& in,
                  int layer, Tensor* x, bool fused) {
  const HeadShape head{layer, c.heads, c.kv_heads, c.head_dim};
  Tensor &position = *in.position, &sequence = *in.sequence;
  Tensor& q =
      fused ? g.norm_linear_rope_kv(*x, b.attn_norm, c.eps, b.qkv, rope, position, sequence, head)
            : g.rope_kv(g.linear(g.rms_norm(*x, b.attn_norm, c.eps), b.qkv), rope, position, sequence, head);
  x = &g.linear(g.attention(q, position, sequence, head), b.o, x);
  Tensor& h = fused ? g.norm_linear_swiglu(*x, b.mlp_norm, c.eps, b.gate_up)
                    : g.swiglu(g.linear(g.rms_norm(*x, b.mlp_norm, c.eps), b.gate_up));
  return &g.linear(h, b.down, x);
}

}  // namespace

Tensor& build_llama(Graph& g, const LlamaConfig& c, const LlamaWeights& w, Inputs& in, Range r, bool fused) {
  in.position = &g.input("position", Rows::kTokens, 1, Type::kI32);
  in.sequence = &g.input("sequence", Rows::kTokens, 1, Type::kI32);

  Tensor* x;
  if (r.first == 0) {
    in.token = &g.input("token", Rows::kTokens, 1, Type::kI32);
    x = &g.embed(*in.token, w.embed);
    if (c.rotated) x = &g.rotate(*x, w.rotation_signs, w.rotation_factor, false);
  } else {
    x = in.x = &g.input("x", Rows::kTokens, c.dim, Type::kF32);
  }
  for (int64_t l = r.first; l < r.last; ++l)
    x = add_block(g, c, w.blocks.at(size_t(l)), w.rope, in, int(l - r.first), x, fused);

  if (r.last == c.layers) {
    in.wanted = &g.input("wanted", Rows::kOutputs, 1, Type::kI32);
    x = &g.gather(*x, *in.wanted);
    if (c.rotated) x = &g.rotate(*x, w.rotation_signs, w.rotation_factor, true);
    x = fused ? &g.norm_linear(*x, w.final_norm, c.eps, w.output())
              : &g.linear(g.rms_norm(*x, w.final_norm, c.eps), w.output());
  }
  x->keep = true;
  return *x;
}

void set_row_roles(LlamaBlock& b, const LlamaConfig& c) {
  b.qkv.roles = {RowRoles::Kind::kQkv, c.heads, c.kv_heads, c.head_dim};
  b.gate_up.roles = {RowRoles::Kind::kGateUp};
}

int64_t LlamaWeights::read_bytes_per_token() const {
  int64_t bytes = output().read_bytes();
  for (const LlamaBlock& b : blocks)
    bytes += b.qkv.read_bytes() + b.o.read_bytes() + b.gate_up.read_bytes() + b.down.read_bytes();
  return bytes;
}

int64_t LlamaModel::weight_bytes() const {
  return weights.read_bytes_per_token() + (weights.head.view.n ? weights.embed.read_bytes() : 0);
}

void fill_rope(LlamaModel& m, int64_t ctx) {
  m.weights.rope = make_weight_f32("rope", ctx, m.config.head_dim, rope_table(m.config, ctx));
}

std::vector<Weight*> all_weights(LlamaWeights& w) {
  std::vector<Weight*> all = {&w.embed, &w.final_norm, &w.rope};
  for (LlamaBlock& blk : w.blocks)
    for (Weight* x : {&blk.attn_norm, &blk.qkv, &blk.o, &blk.mlp_norm, &blk.gate_up, &blk.down})
      all.push_back(x);
  for (Weight* x : {&w.head, &w.rotation_signs, &w.rotation_factor})
    if (x->view.n) all.push_back(x);
  return all;
}

void unload(LlamaModel& m) {
  for (Weight* w : all_weights(m.weights)) w->device.reset();
}

}  // namespace q4s
