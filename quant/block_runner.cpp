#include "quant/block_runner.h"

#include <algorithm>
#include <cassert>

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

enum { kAttnInput, kAttention, kAddAttention, kMlpInput, kMlp, kAddMlp };  // order of pieces_
}  // namespace

BlockRunner::BlockRunner(const LlamaConfig& c, Backend& backend, WeightWork& work, const Weight& rope,
                         int64_t seq_len, int64_t chunk, const BlockRunner* share)
    : config_(c), backend_(backend), work_(work), seq_len_(seq_len) {
  const int64_t sequences = chunk / seq_len;
  assert(sequences >= 1);
  const std::vector<float> ones(c.dim, 1.0f);
  set_norms({ones, ones});
  for (Unit u : kUnits)
    unit_weight(block_, u) = work.make(unit_name(0, u), unit_rows(c, u), unit_columns(c, u));
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
  size_t arena = 0, scratch = 0;
  for (const auto& p : pieces_) {
    p->y->keep = true;
    arena = std::max(arena, p->graph.plan());
    scratch = std::max(scratch, backend.scratch_bytes(p->graph));
  }
  // The GPU's fast attention reads fp16, as in use.
  const KvType kv = backend.name() == "cuda" ? KvType::kF16 : KvType::kF32;
  kv_ = {nullptr, kv, 1, sequences, seq_len, c.kv_dim()};
  memory_ = share ? share->memory_ : std::make_shared<Memory>();
  if (!share) {
    memory_->kv = Buffer::of_bytes(backend, kv_.bytes(), "keys and values of a block");
    memory_->arena = Buffer::of_bytes(backend, arena, "activations of a block");
    memory_->scratch = Buffer::of_bytes(backend, scratch, "scratch");
  }
  kv_.base = memory_->kv.bytes();
  for (const auto& p : pieces_) p->graph.bind(memory_->arena.bytes());
}

BlockRunner::~BlockRunner() = default;

void BlockRunner::set_gain(Weight& w, const std::vector<float>& gain) {
  w = make_weight_f32("norm", 1, int64_t(gain.size()), gain);
  backend_.load(w);
}
void BlockRunner::set_norms(const BlockNorms& norms) {
  set_gain(block_.attn_norm, norms.attn);
  set_gain(block_.mlp_norm, norms.mlp);
}
void BlockRunner::set(Unit u, const float* w) { work_.store(w, unit_weight(block_, u)); }
void BlockRunner::set(const LlamaBlock& b) {
  set_norms(block_norms(b, [this](const std::function<void(Part)>& fn) { backend_.pool().run(fn); }));
  for (Unit u : kUnits) {
    const Buffer w(backend_, unit_rows(config_, u) * unit_columns(config_, u), "weights of a linear");
    work_.load(unit_weight(b, u), w.get());
    set(u, w.get());
  }
}

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
  backend_.run(p.graph, {tokens, 0, seq_len_}, kv_, memory_->scratch.bytes(), &none);
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
