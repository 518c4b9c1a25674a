#include "quant/block_runner.h"

#include <algorithm>
#include <cassert>

#include "kernels/half.h"

namespace q4s {

struct BlockRunner::Piece {
  Graph graph;
  Tensor* x;
  Tensor *position = nullptr, *sequence = nullptr, *residual = nullptr;
  Tensor* y = nullptr;
  explicit Piece(int64_t chunk, int64_t cols)
      : graph({chunk, 0}), x(&graph.input("x", Rows::kTokens, cols, Type::kF32)) {}
};

namespace {

// A matrix as the backend multiplies fast: the GPU has no quick product in f32, and fp16 keeps eleven bits of
// what becomes four (its activations are rounded to as many either way).
Weight make_matrix(Backend& b, const std::string& name, int64_t n, int64_t k, std::vector<float> values) {
  if (b.name() != "cuda") return make_weight_f32(name, n, k, std::move(values));
  Weight w;
  w.name = name;
  w.bytes.resize(2 * values.size());
  b.pool().run([&](Part part) {
    const auto [begin, end] = part.of(int64_t(values.size()), 1024);
    uint16_t* half = reinterpret_cast<uint16_t*>(w.bytes.data());
    for (int64_t i = begin; i < end; ++i) half[i] = float_to_half(values[i]);
  });
  w.view = {.format = Format::kF16, .n = n, .k = k, .data = w.bytes.data()};
  return w;
}

enum { kAttnInput, kAttention, kAddAttention, kMlpInput, kMlp, kAddMlp };  // order of pieces_
}  // namespace

BlockRunner::BlockRunner(const LlamaConfig& c, Backend& backend, const Weight& rope, int64_t seq_len,
                         int64_t chunk)
    : backend_(backend), seq_len_(seq_len) {
  const int64_t sequences = chunk / seq_len;
  assert(sequences >= 1);
  const auto shape = [&](Weight& w, const char* name, int64_t n, int64_t k) {
    std::vector<float> zero(n * k);
    w = n == 1 ? make_weight_f32(name, n, k, std::move(zero))
               : make_matrix(backend, name, n, k, std::move(zero));
  };
  shape(block_.attn_norm, "attn_norm", 1, c.dim);
  shape(block_.qkv, "qkv", c.qkv_dim(), c.dim);
  shape(block_.o, "o", c.dim, c.q_dim());
  shape(block_.mlp_norm, "mlp_norm", 1, c.dim);
  shape(block_.gate_up, "gate_up", 2 * c.hidden, c.dim);
  shape(block_.down, "down", c.dim, c.hidden);
  set_row_roles(block_, c);
  for (int64_t t = 0; t < sequences * seq_len; ++t) {
    position_.push_back(int32_t(t % seq_len));
    sequence_.push_back(int32_t(t / seq_len));
  }

  const auto add = [&](int64_t cols) -> Piece& {
    pieces_.push_back(std::make_unique<Piece>(sequences * seq_len, cols));
    return *pieces_.back();
  };
  const auto norm_piece = [&](const Weight& gain) {
    Piece& p = add(c.dim);
    p.y = &p.graph.rms_norm(*p.x, gain, c.eps);
  };
  const auto add_piece = [&](const Weight& w) {
    Piece& p = add(w.view.k);
    p.residual = &p.graph.input("residual", Rows::kTokens, c.dim, Type::kF32);
    p.y = &p.graph.linear(*p.x, w, p.residual);
  };
  norm_piece(block_.attn_norm);
  {
    Piece& p = add(c.dim);
    Graph& g = p.graph;
    p.position = &g.input("position", Rows::kTokens, 1, Type::kI32);
    p.sequence = &g.input("sequence", Rows::kTokens, 1, Type::kI32);
    const HeadShape heads{0, c.heads, c.kv_heads, c.head_dim};
    Tensor& qkv = g.linear(g.rms_norm(*p.x, block_.attn_norm, c.eps), block_.qkv);
    p.y =
        &g.attention(g.rope_kv(qkv, rope, *p.position, *p.sequence, heads), *p.position, *p.sequence, heads);
  }
  add_piece(block_.o);
  norm_piece(block_.mlp_norm);
  {
    Piece& p = add(c.dim);
    Graph& g = p.graph;
    p.y = &g.swiglu(g.linear(g.rms_norm(*p.x, block_.mlp_norm, c.eps), block_.gate_up));
  }
  add_piece(block_.down);
  for (const auto& p : pieces_) {
    p->y->keep = true;
    arena_bytes_ = std::max(arena_bytes_, p->graph.plan());
    scratch_bytes_ = std::max(scratch_bytes_, backend.scratch_bytes(p->graph));
  }
  kv_ = {nullptr, KvType::kF32, 1, sequences, seq_len, c.kv_dim()};
  kv_.base = backend.allocate(kv_.bytes(), "keys and values of a block");
  arena_ = backend.allocate(arena_bytes_, "activations of a block");
  scratch_ = backend.allocate(scratch_bytes_, "scratch");
  for (const auto& p : pieces_) p->graph.bind(arena_);
}

BlockRunner::~BlockRunner() {
  for (std::byte* p : {kv_.base, arena_, scratch_})
    if (p) backend_.release(p);
}

size_t BlockRunner::bytes() const { return kv_.bytes() + arena_bytes_ + scratch_bytes_; }

void BlockRunner::load(Weight& w, std::vector<float> values) {
  const RowRoles roles = w.roles;
  w = w.view.n == 1 ? make_weight_f32(w.name, 1, w.view.k, std::move(values))
                    : make_matrix(backend_, w.name, w.view.n, w.view.k, std::move(values));
  w.roles = roles;
  backend_.load(w);
}

void BlockRunner::set(BlockWeights b) {
  load(block_.attn_norm, std::move(b.attn_norm));
  load(block_.mlp_norm, std::move(b.mlp_norm));
  set_qkv(std::move(b.qkv));
  set_o(std::move(b.o));
  set_gate_up(std::move(b.gate_up));
  set_down(std::move(b.down));
}
void BlockRunner::set_qkv(std::vector<float> w) { load(block_.qkv, std::move(w)); }
void BlockRunner::set_o(std::vector<float> w) { load(block_.o, std::move(w)); }
void BlockRunner::set_gate_up(std::vector<float> w) { load(block_.gate_up, std::move(w)); }
void BlockRunner::set_down(std::vector<float> w) { load(block_.down, std::move(w)); }

void BlockRunner::run(Piece& p, const float* x, float* residual, float* y, int64_t tokens) {
  assert(tokens % seq_len_ == 0 && tokens <= p.graph.max().tokens);
  // The ends of a piece lie where the caller says; only what is between them lies in the arena.
  p.x->data = reinterpret_cast<std::byte*>(const_cast<float*>(x));
  if (residual) p.residual->data = reinterpret_cast<std::byte*>(residual);
  p.y->data = reinterpret_cast<std::byte*>(y);
  if (p.position) {
    backend_.write(p.position->data, position_.data(), size_t(tokens) * sizeof(int32_t));
    backend_.write(p.sequence->data, sequence_.data(), size_t(tokens) * sizeof(int32_t));
  }
  static const Observer none;  // the eager path: a replayed step would remember where its ends lay
  backend_.run(p.graph, {tokens, 0, seq_len_}, kv_, scratch_, &none);
}

void BlockRunner::attn_input(const float* x, float* y, int64_t t) {
  run(*pieces_[kAttnInput], x, nullptr, y, t);
}
void BlockRunner::attention(const float* x, float* y, int64_t t) {
  run(*pieces_[kAttention], x, nullptr, y, t);
}
void BlockRunner::add_attention(const float* a, float* x, int64_t t) {
  run(*pieces_[kAddAttention], a, x, x, t);
}
void BlockRunner::mlp_input(const float* x, float* y, int64_t t) {
  run(*pieces_[kMlpInput], x, nullptr, y, t);
}
void BlockRunner::mlp(const float* x, float* y, int64_t t) { run(*pieces_[kMlp], x, nullptr, y, t); }
void BlockRunner::add_mlp(const float* a, float* x, int64_t t) { run(*pieces_[kAddMlp], a, x, x, t); }

}  // namespace q4s
