#include "quant/quantize.h"

#include <algorithm>

namespace q4s {
namespace {

constexpr int64_t kChunk = 4096;  // tokens of a step; on the CPU that does not depend on the model
constexpr int64_t kMostChunk = 32768;
constexpr int64_t kChunkValues = int64_t(1) << 26;  // of the widest activation
constexpr int64_t kTogether = 16384;                // tokens that the GPU sums at a time

}  // namespace

Format4 QuantizeOptions::format_of(const std::string& name) const {
  for (const auto& [pattern, format] : special)
    if (std::regex_search(name, pattern)) return format;
  return {solve.grid, solve.group};
}

QuantizedFrame quantize_frame(const LlamaModel& m, const QuantizeOptions& o, const Team& team) {
  QuantizedFrame f;
  f.config = m.config;
  f.final_norm = unpack(m.weights.final_norm, team);
  if (o.rotate) f.rotation = make_rotation(m.config.dim, o.seed);
  if (m.config.tied) {
    f.config.rotated = o.rotate;
    f.embed = pack_table(m.weights.embed, o.head, nullptr, nullptr, team);
  } else {
    const Rotation* r = o.rotate ? &f.rotation : nullptr;
    f.embed = pack_table(m.weights.embed, o.head, nullptr, r, team);
    f.head = pack_table(m.weights.head, o.head, r ? &f.final_norm : nullptr, r, team);
    if (r) std::fill(f.final_norm.begin(), f.final_norm.end(), 1.0f);
  }
  return f;
}

WalkShape walk_shape(const LlamaConfig& c, const QuantizeOptions& o, int64_t samples, int64_t seq_len,
                     bool gpu) {
  const int64_t step = gpu ? std::clamp(kChunkValues / (2 * c.hidden), kChunk, kMostChunk) : kChunk;
  WalkShape w{};
  w.chunk = std::clamp<int64_t>(step / seq_len, 1, samples) * seq_len;
  const auto held = [&](int64_t cols) {
    const int64_t bytes = (gpu ? 2 : 4) * cols, most = o.most_held / bytes, all = samples * seq_len;
    const int64_t tokens = all <= most ? all : most / w.chunk * w.chunk;
    w.held_bytes = std::max(w.held_bytes, tokens * bytes);
    return tokens;
  };
  w.held_o = held(c.q_dim());
  w.held_down = held(c.hidden);
  return w;
}

QuantizePlan plan_quantize(const LlamaConfig& c, const QuantizeOptions& o, int64_t samples, int64_t seq_len,
                           bool gpu) {
  const int64_t streams = o.corrects() ? 2 : 1, tokens = samples * seq_len;
  const int64_t k = std::max({c.dim, c.q_dim(), c.hidden});
  int64_t widest = 0, residual = 0;
  for (Unit u : kUnits) {
    const int64_t count = unit_rows(c, u) * unit_columns(c, u);
    widest = std::max(widest, count);
    if (writes_residual(u)) residual = std::max(residual, count);
  }
  QuantizePlan p{};
  p.weights = 4 * widest + (samples ? (gpu ? 2 : 4) * streams * c.linear_weights() / c.layers : 0);
  p.hessian = 4 * k * k * (1 + streams) + (streams == 2 ? 4 * residual : 0);
  // A unit's copies and codes; the factorisation in f64, what a step of the solve works in, or tokens that
  // wait for their sums.
  const int64_t waiting = gpu ? 2 * kTogether * (streams * k + (streams == 2 ? c.dim : 0)) : 0;
  p.working = 10 * widest + std::max({(k > kExactFactor ? 8 : 16) * k * k, 16 * widest + 4 * k * k, waiting});
  if (o.couple && streams == 2) {  // targets and errors of coupled rows, and their feedback
    p.working += 8 * std::max(unit_rows(c, Unit::kQkv) * c.dim, c.dim * c.hidden) + 4 * c.dim * c.dim;
  }
  if (!samples) return p;
  const WalkShape walk = walk_shape(c, o, samples, seq_len, gpu);
  p.activations = (gpu ? 2 : 4) * tokens * streams * c.dim + walk.held_bytes;
  p.forward = 4 * walk.chunk * (3 * c.hidden + 2 * streams * k);
  return p;
}

double quantize_flops(const LlamaConfig& c, const QuantizeOptions& o, int64_t samples, int64_t seq_len,
                      bool self_written) {
  const double tokens = double(samples * seq_len), layers = double(c.layers);
  const double weights = double(c.linear_weights()), streams = o.corrects() ? 2 : 1;
  double flops = tokens * 2 * weights * streams;
  if (self_written) flops += tokens * 2 * (weights + double(c.vocab * c.dim));
  for (Unit u : kUnits) {
    const double n = double(unit_rows(c, u)), k = double(unit_columns(c, u));
    double gram = k * k / 2;
    if (o.corrects()) gram += k * k + (writes_residual(u) ? n * k : 0);
    flops += layers * 2 * (tokens * gram + 11 * n * k * k + k * k * k);
  }
  return flops;
}

void check_weights(const LlamaModel& m, const Team& team, const std::function<void()>& tick) {
  constexpr int64_t kSlab = 4096;
  const auto check = [&](const Weight& w) {
    for (int64_t i = 0; i < w.view.n; i += kSlab) {
      unpack_rows(w, i, std::min(w.view.n, i + kSlab), nullptr, team);
      tick();
    }
  };
  check(m.weights.embed);
  for (const LlamaBlock& b : m.weights.blocks)
    for (const Weight* w : {&b.attn_norm, &b.qkv, &b.o, &b.mlp_norm, &b.gate_up, &b.down}) check(*w);
  check(m.weights.final_norm);
  check(m.weights.head);
}

}  // namespace q4s
