// A small random model and calibration tokens for the quantiser's tests.
#pragma once
#include "kernels/philox.h"
#include "models/llama.h"
#include "quant/quantize.h"

namespace q4s::tiny {

// Widths that are no multiples of a group; grouped heads; heads * head_dim != dim.
inline LlamaConfig config(bool tied) {
  LlamaConfig c;
  c.dim = 72;
  c.hidden = 100;
  c.layers = 2;
  c.heads = 4;
  c.kv_heads = 2;
  c.head_dim = 12;
  c.vocab = 90;
  c.context = 64;
  c.tied = tied;
  return c;
}

inline LlamaModel model(bool tied, uint64_t seed = 1) {
  LlamaModel m = random_llama(config(tied), seed, Format::kF32, 0, Format::kF32);
  return m;
}

inline Calibration calibration(int64_t samples = 24, int64_t seq_len = 32, int64_t vocab = 90) {
  Calibration c{"test", "", samples, seq_len, 0, {}};
  for (int64_t i = 0; i < samples * seq_len; ++i)
    c.tokens.push_back(int32_t(philox_uniform(3, 0, uint64_t(i)) * double(vocab)));
  return c;
}

struct Result {
  std::vector<UnitResult> units;  // four a block
  std::vector<BlockReport> blocks;
};

inline Result quantize(LlamaModel& m, const Calibration* calibration, const QuantizeOptions& o,
                       Backend& backend, const Result* kept = nullptr, int64_t kept_blocks = 0) {
  const Team team = [&](const std::function<void(Part)>& fn) { backend.pool().run(fn); };
  std::vector<Weight*> weights = {&m.weights.embed, &m.weights.final_norm};
  for (LlamaBlock& b : m.weights.blocks)
    for (Weight* w : {&b.attn_norm, &b.qkv, &b.o, &b.mlp_norm, &b.gate_up, &b.down}) weights.push_back(w);
  if (m.weights.head.view.n) weights.push_back(&m.weights.head);
  make_cpu_backend(1)->load(weights);  // random weights get their storage
  const QuantizedFrame frame = quantize_frame(m, o, team);
  Result r;
  QuantizeSink sink;
  if (kept) {
    sink.kept = [&](int64_t block, Unit u) -> std::optional<WeightView> {
      if (block >= kept_blocks) return std::nullopt;
      return kept->units.at(size_t(block * 4 + int64_t(u))).packed.view;
    };
  }
  sink.unit = [&](int64_t, Unit, UnitResult& u) { r.units.push_back(std::move(u)); };
  sink.block_done = [&](int64_t, const BlockNorms&, const BlockReport& b) { r.blocks.push_back(b); };
  quantize_blocks(m, backend, frame, calibration, o, sink);
  return r;
}
inline Result quantize(LlamaModel& m, const Calibration* calibration, const QuantizeOptions& o, int threads,
                       const Result* kept = nullptr, int64_t kept_blocks = 0) {
  return quantize(m, calibration, o, *make_cpu_backend(threads), kept, kept_blocks);
}

}  // namespace q4s::tiny
