#include "quant/allocate.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "kernels/compare_logits.h"
#include "kernels/embed.h"
#include "quant/block_runner.h"
#include "quant/buffer.h"
#include "quant/couple.h"
#include "runtime/error.h"
#include "runtime/log.h"

namespace q4s {
namespace {

constexpr int64_t kEffectTokens = 2048;  // of the forward passes that measure effects
constexpr int64_t kEffectRows = 512;     // positions whose logits are compared
constexpr double kDamp = 0.05;

const Format4 kFiner[] = {{GridKind::kSigned, 64}, {GridKind::kSigned, 32}, {GridKind::kInt8, 64}};

// Mean KL(p || q) of rows of logits (rows, V).
double mean_kl(const std::vector<float>& a, const std::vector<float>& b, int64_t vocab, const Team& team) {
  const int64_t rows = int64_t(a.size()) / vocab;
  std::vector<double> kl(rows);
  team([&](Part part) {
    const auto [begin, end] = part.of(rows);
    for (int64_t r = begin; r < end; ++r) kl[r] = compare_logits(&a[r * vocab], &b[r * vocab], vocab).kl;
  });
  return std::accumulate(kl.begin(), kl.end(), 0.0) / double(rows);
}

// The rest of the model from the residual stream before block `first` to logits.
class Tail {
 public:
  Tail(LlamaModel& m, Backend& b, int64_t first, int64_t tokens, int64_t rows)
      : graph_({tokens, rows}),
        y_(&build_llama(graph_, m.config, m.weights, in_, {first, m.config.layers})),
        arena_bytes_(graph_.plan()),
        scratch_bytes_(b.scratch_bytes(graph_)) {}
  size_t arena_bytes() const { return arena_bytes_; }
  size_t scratch_bytes() const { return scratch_bytes_; }

  std::vector<float> run(Backend& b, const float* x, const std::vector<int32_t>& position,
                         const std::vector<int32_t>& sequence, const std::vector<int32_t>& wanted,
                         const KvCache& kv, std::byte* arena, std::byte* scratch, int64_t seq_len) {
    graph_.bind(arena);
    in_.x->data = reinterpret_cast<std::byte*>(const_cast<float*>(x));
    b.write(in_.position->data, position.data(), 4 * position.size());
    b.write(in_.sequence->data, sequence.data(), 4 * sequence.size());
    b.write(in_.wanted->data, wanted.data(), 4 * wanted.size());
    static const Observer none;
    b.run(graph_, {int64_t(position.size()), int64_t(wanted.size()), seq_len}, kv, scratch, &none);
    std::vector<float> logits(wanted.size() * size_t(y_->cols));
    b.read(logits.data(), y_->data, logits.size() * sizeof(float));
    return logits;
  }

 private:
  Graph graph_;
  Inputs in_;
  Tensor* y_;
  size_t arena_bytes_, scratch_bytes_;
};

}  // namespace

int64_t format_bytes(int64_t n, int64_t k, const Format4& f) {
  const int64_t group = f.group == 0 ? k : std::min(f.group, k);
  return n * ((grid_bits(f.grid) * k + 7) / 8 + 2 * ceil_div(k, group));
}

std::vector<UnitChoices> try_formats(LlamaModel& m, Backend& backend, const QuantizedFrame& frame,
                                     const Calibration& calibration, const QuantizeOptions& options,
                                     const std::function<void(int64_t, int64_t)>& progress) {
  std::vector<UnitChoices> all;
  QuantizeSink sink;
  sink.unit = [](int64_t, Unit, UnitResult&) {};
  sink.block_done = [](int64_t, const BlockNorms&, const BlockReport&) {};
  sink.progress = progress;
  sink.solved = [&](const SolvedUnit& s) {
    const int64_t n = s.n, k = s.k;
    UnitChoices c{s.block, s.unit, 1.0, 0.0, {}, 0};
    const auto add = [&](const Format4& f, const std::vector<RowLoss>& rows) {
      const LossSummary l = summarize(rows, k, 0, n);
      c.candidates.push_back({f, format_bytes(n, k, f), l.loss, l.target});
    };
    const Format4 first{s.options.grid, s.options.group};
    add(first, s.rows);
    for (const Format4& f : kFiner) {
      if (format_bytes(n, k, f) <= c.candidates.back().bytes) continue;
      SolveOptions o = s.options;
      o.grid = f.grid == GridKind::kSigned ? first.grid : f.grid;
      o.group = f.group;
      add({o.grid, o.group}, s.solver.solve(s.w, o).rows);
    }
    all.push_back(std::move(c));
  };
  quantize_blocks(m, backend, frame, &calibration, options, sink);
  return all;
}

void measure_effects(LlamaModel& m, Backend& backend, const Calibration& calibration,
                     std::vector<UnitChoices>& choices, bool coupled,
                     const std::function<void(int64_t, int64_t)>& progress) {
  const LlamaConfig& c = m.config;
  const Team team = [&](const std::function<void(Part)>& fn) { backend.pool().run(fn); };
  const int64_t seq_len = calibration.seq_len;
  const int64_t sequences = std::clamp<int64_t>(kEffectTokens / seq_len, 1, calibration.samples);
  const int64_t tokens = sequences * seq_len, stride = ceil_div(tokens, kEffectRows);
  std::vector<int32_t> position, sequence, wanted;
  for (int64_t t = 0; t < tokens; ++t) {
    position.push_back(int32_t(t % seq_len));
    sequence.push_back(int32_t(t / seq_len));
    if (t % stride == stride - 1) wanted.push_back(int32_t(t));
  }
  fill_rope(m, seq_len);
  std::vector<Weight*> weights = {&m.weights.embed, &m.weights.final_norm, &m.weights.rope};
  for (LlamaBlock& b : m.weights.blocks)
    for (Weight* w : {&b.attn_norm, &b.qkv, &b.o, &b.mlp_norm, &b.gate_up, &b.down}) weights.push_back(w);
  if (m.weights.head.view.n) weights.push_back(&m.weights.head);
  backend.load(weights);

  std::vector<std::unique_ptr<Tail>> tails;  // [l]: from before block l + 1
  size_t arena_bytes = 0, scratch_bytes = 0;
  for (int64_t l = 0; l < c.layers; ++l) {
    tails.push_back(std::make_unique<Tail>(m, backend, l + 1, tokens, int64_t(wanted.size())));
    arena_bytes = std::max(arena_bytes, tails.back()->arena_bytes());
    scratch_bytes = std::max(scratch_bytes, tails.back()->scratch_bytes());
  }
  const auto floats = [](size_t bytes) { return int64_t(bytes / sizeof(float)) + 64; };
  const Buffer arena(backend, floats(arena_bytes), "activations"),
      scratch(backend, floats(scratch_bytes), "scratch");
  KvCache kv{nullptr, KvType::kF32, c.layers, sequences, seq_len, c.kv_dim()};
  const Buffer cache(backend, floats(kv.bytes()), "the KV cache");
  kv.base = reinterpret_cast<std::byte*>(cache.get());

  const int64_t widest = std::max({c.dim, c.q_dim(), c.hidden});
  const Buffer x(backend, tokens * c.dim, "stream"), moved(backend, tokens * c.dim, "stream");
  std::vector<float> host(tokens * c.dim);
  team([&](Part p) { embed_cpu({m.weights.embed.view, calibration.tokens.data(), host.data(), tokens}, p); });
  const auto bytes = [](float* p) { return reinterpret_cast<std::byte*>(p); };
  const std::unique_ptr<WeightWork> work = make_weight_work(backend);
  BlockRunner runner(c, backend, *work, m.weights.rope, seq_len, tokens);
  const std::unique_ptr<UnitSolver> solver = make_unit_solver(backend);

  const auto logits = [&](int64_t block, const float* stream) {
    return tails[block]->run(backend, stream, position, sequence, wanted, kv, bytes(arena.get()),
                             bytes(scratch.get()), seq_len);
  };
  // One block on `moved`, which starts as the stream before it; the solver sums the input of unit `u` as it
  // passes by.
  const auto run_block = [&](Unit u, const std::function<void(const float* in)>& see = nullptr) {
    float* s = moved.get();
    backend.write(bytes(s), host.data(), host.size() * sizeof(float));
    Buffer a(backend, tokens * widest, "inputs");
    solver->begin(unit_rows(c, u), unit_columns(c, u), sequences, false, false);
    const auto keep = [&](Unit here) {
      if (here == u && see) see(a.get());
      if (here == u) solver->add(a.get(), nullptr, nullptr, nullptr, tokens);
    };
    runner.attn_input(s, a.get(), tokens);
    keep(Unit::kQkv);
    runner.attention(s, a.get(), tokens);
    keep(Unit::kO);
    runner.add_attention(a.get(), s, tokens);
    runner.mlp_input(s, a.get(), tokens);
    keep(Unit::kGateUp);
    runner.mlp(s, a.get(), tokens);
    keep(Unit::kDown);
    runner.add_mlp(a.get(), s, tokens);
  };

  SolveOptions gptq;
  gptq.refine = false;
  std::vector<float> reference;
  for (int64_t l = 0; l < c.layers; ++l) {
    const LlamaBlock& block = m.weights.blocks[l];
    runner.set(block);
    for (Unit u : kUnits) {
      const int64_t n = unit_rows(c, u), k = unit_columns(c, u);
      const Buffer w(backend, n * k, "weights of a linear");
      const std::vector<float> exact = unpack(unit_weight(block, u), team);
      const auto write = [&] { backend.write(w.bytes(), exact.data(), 4 * exact.size()); };
      write();
      RowCoupling coupling;
      run_block(u, [&](const float* in) {  // exact, for the statistics
        if (coupled && u == Unit::kQkv)
          coupling = couple_attention(c,
                                      queries_and_keys(c, backend, *solver, in, w.get(),
                                                       std::min(sequences, coupling_sequences(c)), seq_len),
                                      seq_len, team);
      });
      solver->finish();
      solver->factor(kDamp, true);
      if (coupled && u == Unit::kDown && l == c.layers - 1)
        coupling = couple_output(m, backend, *solver, nullptr, moved.get(), tokens, team);
      gptq.coupling = coupling.blocks ? &coupling : nullptr;
      if (reference.empty()) reference = logits(l, moved.get());
      const double error = summarize(solver->solve(w.get(), gptq).rows, k, 0, n).relative;
      solver->values(w.get());
      runner.set(u, w.get());
      run_block(u);
      const std::vector<float> got = logits(l, moved.get());
      write();
      runner.set(u, w.get());  // from here on as it was
      UnitChoices& choice = choices.at(size_t(l * 4 + int64_t(u)));
      choice.alone = mean_kl(reference, got, c.vocab, team);
      choice.effect = error > 0 ? choice.alone / error : 0.0;
      if (progress) progress(l * 4 + int64_t(u) + 1, c.layers * 4);
    }
    run_block(Unit::kQkv);
    backend.read(host.data(), bytes(moved.get()), host.size() * sizeof(float));
  }
}

void choose_worst(std::vector<UnitChoices>& all, int64_t count) {
  std::vector<UnitChoices*> order;
  for (UnitChoices& c : all) order.push_back(&c);
  std::stable_sort(order.begin(), order.end(), [](const UnitChoices* a, const UnitChoices* b) {
    return a->candidates[0].loss > b->candidates[0].loss;
  });
  for (int64_t i = 0; i < std::min(count, int64_t(order.size())); ++i) {
    UnitChoices& c = *order[i];
    c.chosen = int(c.candidates.size()) - 1;
    for (int j = int(c.candidates.size()) - 1; j > 0; --j)
      if (c.candidates[j].loss < c.candidates[0].loss / 2) c.chosen = j;
  }
}

void choose_by_budget(std::vector<UnitChoices>& all, const LlamaConfig& config, double bits_per_weight) {
  struct Step {
    size_t unit;
    int to;
    int64_t bytes;  // more than the step before
    double rate;    // damage saved per byte
  };
  std::vector<Step> steps;
  int64_t used = 0;
  for (size_t i = 0; i < all.size(); ++i) {
    UnitChoices& c = all[i];
    c.chosen = 0;
    used += c.candidates[0].bytes;
    // Lower convex hull: from each point the step of the best rate.
    for (int at = 0;;) {
      int best = at;
      double best_rate = 0.0;
      for (int j = at + 1; j < int(c.candidates.size()); ++j) {
        const double rate =
            (c.damage(at) - c.damage(j)) / double(c.candidates[j].bytes - c.candidates[at].bytes);
        if (rate > best_rate) best = j, best_rate = rate;
      }
      if (best == at) break;
      steps.push_back({i, best, c.candidates[best].bytes - c.candidates[at].bytes, best_rate});
      at = best;
    }
  }
  const int64_t budget = int64_t(bits_per_weight / 8 * double(config.linear_weights()));
  if (used > budget) {
    throw Error(ErrorKind::kUsage,
                strprintf("--bpw %.3f: the coarsest choice takes %.3f bits a weight", bits_per_weight,
                          8.0 * double(used) / double(config.linear_weights())));
  }
  std::stable_sort(steps.begin(), steps.end(), [](const Step& a, const Step& b) { return a.rate > b.rate; });
  std::vector<bool> closed(all.size());  // a step was too dear: later ones of the same linear would skip it
  for (const Step& s : steps) {
    if (closed[s.unit]) continue;
    if (used + s.bytes > budget) {
      closed[s.unit] = true;
      continue;
    }
    used += s.bytes;
    all[s.unit].chosen = s.to;
  }
}

}  // namespace q4s
