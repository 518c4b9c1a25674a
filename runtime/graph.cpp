#include "runtime/graph.h"

#include <algorithm>
#include <unordered_map>

#include "runtime/error.h"
#include "runtime/plan.h"

namespace q4s {
namespace {

void require(bool ok, const std::string& node, const std::string& what, int64_t expected, int64_t got) {
  if (ok) return;
  throw Error(ErrorKind::kInput,
              node + ": " + what + ": expected " + std::to_string(expected) + ", got " + std::to_string(got));
}
void require_equal(const std::string& node, const std::string& what, int64_t expected, int64_t got) {
  require(expected == got, node, what, expected, got);
}

}  // namespace

const char* op_name(Op op) {
  static constexpr const char* kNames[] = {"input",   "embed",     "gather", "rms_norm", "linear",
                                           "rope_kv", "attention", "swiglu", "rotate"};
  static_assert(std::size(kNames) == kOpCount);
  return kNames[int(op)];
}

Weight make_weight_f32(std::string name, int64_t n, int64_t k, std::vector<float> values) {
  require_equal(name, "elements", n * k, int64_t(values.size()));
  Weight w;
  w.name = std::move(name);
  w.bytes.resize(values.size() * sizeof(float));
  std::copy_n(reinterpret_cast<const uint8_t*>(values.data()), w.bytes.size(), w.bytes.data());
  w.view = {.format = Format::kF32, .n = n, .k = k, .data = w.bytes.data()};
  return w;
}

Tensor& Graph::add(Op op, std::string name, Rows rows, int64_t cols, std::initializer_list<Tensor*> src) {
  auto t = std::make_unique<Tensor>();
  t->op = op;
  t->name = std::move(name);
  t->rows = rows;
  t->cols = cols;
  std::copy(src.begin(), src.end(), t->src.begin());
  for (Tensor* s : src)
    if (s) {
      ++s->readers;
      s->reader = t.get();
    }
  nodes_.push_back(std::move(t));
  return *nodes_.back();
}

Tensor& Graph::input(std::string name, Rows rows, int64_t cols, Type type) {
  Tensor& t = add(Op::kInput, std::move(name), rows, cols, {});
  t.type = type;
  return t;
}

Tensor& Graph::embed(Tensor& ids, const Weight& table) {
  require(ids.type == Type::kI32, table.name, "type of ids", int(Type::kI32), int(ids.type));
  Tensor& t = add(Op::kEmbed, table.name + ".rows", ids.rows, table.view.k, {&ids});
  t.weight = &table;
  return t;
}

Tensor& Graph::gather(Tensor& x, Tensor& index) {
  require(index.type == Type::kI32, "gather", "type of index", int(Type::kI32), int(index.type));
  return add(Op::kGather, x.name + ".wanted", Rows::kOutputs, x.cols, {&x, &index});
}

Tensor& Graph::rms_norm(Tensor& x, const Weight& gain, float eps) {
  require_equal(gain.name, "columns", x.cols, gain.view.k);
  Tensor& t = add(Op::kRmsNorm, gain.name + ".out", x.rows, x.cols, {&x});
  t.weight = &gain;
  t.eps = eps;
  return t;
}

Tensor& Graph::linear(Tensor& x, const Weight& w, Tensor* residual) {
  require_equal(w.name, "columns", x.cols, w.view.k);
  if (residual) require_equal(w.name, "rows against residual", residual->cols, w.view.n);
  Tensor& t = add(Op::kLinear, w.name + ".out", x.rows, w.view.n, {&x, residual});
  t.weight = &w;
  return t;
}

Tensor& Graph::rope_kv(Tensor& qkv, const Weight& table, Tensor& position, Tensor& sequence, HeadShape h) {
  require_equal(qkv.name, "columns", (h.heads + 2 * h.kv_heads) * h.head_dim, qkv.cols);
  require_equal(table.name, "columns", h.head_dim, table.view.k);
  Tensor& t =
      add(Op::kRopeKv, qkv.name + ".rope", qkv.rows, h.heads * h.head_dim, {&qkv, &position, &sequence});
  t.weight = &table;
  t.head = h;
  return t;
}

Tensor& Graph::attention(Tensor& q, Tensor& position, Tensor& sequence, HeadShape h) {
  require_equal(q.name, "columns", h.heads * h.head_dim, q.cols);
  require(h.kv_heads > 0 && h.heads % h.kv_heads == 0, q.name, "heads per kv head", h.kv_heads, h.heads);
  Tensor& t = add(Op::kAttention, q.name + ".attention", q.rows, q.cols, {&q, &position, &sequence});
  t.head = h;
  return t;
}

Tensor& Graph::swiglu(Tensor& gate_up) {
  require(gate_up.cols % 2 == 0, gate_up.name, "columns modulo 2", 0, gate_up.cols % 2);
  return add(Op::kSwiglu, gate_up.name + ".swiglu", gate_up.rows, gate_up.cols / 2, {&gate_up});
}

Tensor& Graph::rotate(Tensor& x, const Weight& signs, const Weight& factor, bool inverse) {
  require_equal(signs.name, "columns", x.cols, signs.view.k);
  require_equal(factor.name, "columns", factor.view.n, factor.view.k);
  Tensor& t = add(Op::kRotate, x.name + (inverse ? ".unrotated" : ".rotated"), x.rows, x.cols, {&x});
  t.weight = &signs;
  t.weight2 = &factor;
  t.inverse = inverse;
  return t;
}

Tensor& Graph::norm_linear(Tensor& x, const Weight& gain, float eps, const Weight& w) {
  require_equal(gain.name, "columns", x.cols, gain.view.k);
  Tensor& t = linear(x, w);
  t.gain = &gain;
  t.eps = eps;
  return t;
}

Tensor& Graph::norm_linear_swiglu(Tensor& x, const Weight& gain, float eps, const Weight& gate_up) {
  require(gate_up.view.n % 2 == 0, gate_up.name, "rows modulo 2", 0, gate_up.view.n % 2);
  Tensor& t = norm_linear(x, gain, eps, gate_up);
  t.name = gate_up.name + ".swiglu";
  t.cols = gate_up.view.n / 2;
  t.epilogue = Epilogue::kSwiglu;
  return t;
}

Tensor& Graph::norm_linear_rope_kv(Tensor& x, const Weight& gain, float eps, const Weight& qkv,
                                   const Weight& table, Tensor& position, Tensor& sequence, HeadShape h) {
  require_equal(qkv.name, "rows", (h.heads + 2 * h.kv_heads) * h.head_dim, qkv.view.n);
  require_equal(table.name, "columns", h.head_dim, table.view.k);
  Tensor& t = norm_linear(x, gain, eps, qkv);
  t.name = qkv.name + ".rope";
  t.cols = h.heads * h.head_dim;
  t.src = {&x, &position, &sequence};
  t.weight2 = &table;
  t.head = h;
  t.epilogue = Epilogue::kRopeKv;
  return t;
}

Tensor* Graph::find(std::string_view name) const {
  for (const auto& n : nodes_)
    if (n->name == name) return n.get();
  return nullptr;
}

size_t Graph::plan() {
  const int last_step = int(nodes_.size());
  std::unordered_map<const Tensor*, int> step, last_use;
  for (int i = 0; i < last_step; ++i)
    for (const Tensor* s : nodes_[size_t(i)]->src)
      if (s) last_use[s] = i;
  std::vector<Lifetime> lives;  // of the memory that node i is in; empty where that is another's
  std::vector<int> home;        // of node i: where its lifetime is
  for (int i = 0; i < last_step; ++i) {
    const Tensor& t = *nodes_[size_t(i)];
    step[&t] = i;
    const size_t bytes = size_t(max_.of(t.rows)) * size_t(t.cols) * 4;
    // Inputs are written before the first node runs.
    lives.push_back({bytes, t.op == Op::kInput ? 0 : i, t.op == Op::kInput || t.keep ? last_step : i});
    home.push_back(i);
    for (const Tensor* s : t.src) {
      if (!s) continue;
      Lifetime& life = lives[size_t(home[size_t(step.at(s))])];
      life.last = std::max(life.last, i);
    }
    // A residual that nobody reads again becomes the sum.
    const Tensor* residual = t.op == Op::kLinear && t.epilogue == Epilogue::kNone ? t.src[1] : nullptr;
    if (!residual || residual->op == Op::kInput || residual->keep || last_use.at(residual) != i ||
        t.src[0] == residual)
      continue;
    home.back() = home[size_t(step.at(residual))];
    Lifetime& life = lives[size_t(home.back())];
    life.last = std::max(life.last, lives.back().last);
    lives.back() = {0, i, i};
  }
  const size_t bytes = plan_arena(lives);
  offsets_.clear();
  for (const int h : home) offsets_.push_back(lives[size_t(h)].offset);
  return bytes;
}

void Graph::bind(std::byte* arena) {
  for (size_t i = 0; i < nodes_.size(); ++i) nodes_[i]->data = arena + offsets_.at(i);
}

}  // namespace q4s
