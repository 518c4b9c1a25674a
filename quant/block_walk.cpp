// quantize_blocks: the walk over a model. Two residual streams (the quantised model's, and where asked the
// full-precision one's) go from block to block; each unit's inputs are made on the way, summed, and thrown
// away.
#include <algorithm>
#include <cassert>
#include <chrono>
#include <future>

#include "kernels/half.h"
#include "quant/activations.h"
#include "quant/block_runner.h"
#include "quant/couple.h"
#include "quant/hidden_order.h"
#include "quant/quantize.h"
#include "quant/seed.h"
#include "runtime/error.h"
#include "runtime/log.h"

namespace q4s {
namespace {

using Clock = std::chrono::steady_clock;

// One table into a stream, through the engine's own graph.
void embed(const LlamaConfig& c, Backend& b, const Calibration& calibration, const WeightView& table,
           const Rotation* rotation, int64_t chunk, Activations& x) {
  Weight rows;
  rows.name = "embed";
  rows.view = table;
  b.load(rows);
  Weight signs, factor;
  Graph g({chunk, 0});
  Tensor& ids = g.input("token", Rows::kTokens, 1, Type::kI32);
  Tensor* y = &g.embed(ids, rows);
  if (rotation) {
    signs = make_weight_f32("rotation.signs", 1, c.dim, rotation->signs);
    factor = make_weight_f32("rotation.factor", rotation->m, rotation->m, rotation->factor);
    b.load(signs);
    b.load(factor);
    y = &g.rotate(*y, signs, factor, false);
  }
  y->keep = true;
  const Buffer arena = Buffer::of_bytes(b, g.plan(), "embedding"),
               scratch = Buffer::of_bytes(b, b.scratch_bytes(g), "scratch");
  g.bind(arena.bytes());
  const int64_t tokens = calibration.samples * calibration.seq_len;
  static const Observer eager;
  for (int64_t t = 0; t < tokens; t += chunk) {
    const int64_t n = std::min(chunk, tokens - t);
    y->data = reinterpret_cast<std::byte*>(x.blank(t));
    b.write(ids.data, &calibration.tokens[t], sizeof(int32_t) * size_t(n));
    b.run(g, {n, 0}, {}, scratch.bytes(), &eager);
    x.close(t, n);
  }
}

class BlockWalk {
 public:
  BlockWalk(const LlamaModel& model, Backend& backend, const QuantizedFrame& frame,
            const Calibration* calibration, const QuantizeOptions& options, const QuantizeSink& sink)
      : model_(model),
        backend_(backend),
        calibration_(calibration),
        o_(options),
        sink_(sink),
        c_(frame.config),
        team_([&backend](const std::function<void(Part)>& fn) { backend.pool().run(fn); }),
        work_(make_weight_work(backend)),
        clock_(make_stage_clock(backend)),
        solver_(make_unit_solver(backend, clock_.get())),
        r1_(frame.rotation),
        r2_(make_rotation(c_.head_dim, options.seed + 1)) {
    clock_->enter(Stage::kLoad);
    int64_t largest = 0, widest = 0;
    for (Unit u : kUnits) {
      largest = std::max(largest, unit_rows(c_, u) * unit_columns(c_, u));
      widest = std::max(widest, unit_columns(c_, u));
    }
    w_ = Buffer(backend, largest, "weights of a linear");
    if (!calibration) return;
    shape_ = walk_shape(c_, o_, calibration->samples, calibration->seq_len, backend.name() == "cuda");
    seq_len_ = calibration->seq_len;
    tokens_ = calibration->samples * seq_len_;
    chunk_ = shape_.chunk;
    rope_ = make_weight_f32("rope", seq_len_, c_.head_dim, rope_table(c_, seq_len_));
    backend.load(rope_);
    quant_ = std::make_unique<BlockRunner>(c_, backend, *work_, rope_, seq_len_, chunk_);
    in_ = Buffer(backend, chunk_ * widest, "inputs of a linear");
    const auto rest = [&](int64_t cols, const char* purpose) {
      return Activations(backend, *work_, tokens_, cols, chunk_, purpose);
    };
    x_ = rest(c_.dim, "the residual stream");
    held_ = Buffer::of_bytes(backend, size_t(shape_.held_bytes), "inputs of o and down");
    hold_o_ = Activations(*work_, c_.q_dim(), held_.bytes(), in_.get());
    hold_down_ = Activations(*work_, c_.hidden, held_.bytes(), in_.get());
    // An untied table of the file is rotated already.
    embed(c_, backend, *calibration, frame.embed.view, o_.rotate && c_.rotated ? &r1_ : nullptr, chunk_, x_);
    if (!o_.corrects()) return;
    full_ = std::make_unique<BlockRunner>(c_, backend, *work_, rope_, seq_len_, chunk_, quant_.get());
    in_full_ = Buffer(backend, chunk_ * widest, "full-precision inputs of a linear");
    x_full_ = rest(c_.dim, "the full-precision residual stream");
    embed(c_, backend, *calibration, model.weights.embed.view, o_.rotate ? &r1_ : nullptr, chunk_, x_full_);
  }

  StageClock& clock() { return *clock_; }

  void block(int64_t index) {
    const auto start = Clock::now();
    BlockReport report;
    report.block = index;
    norms_ = block_norms(model_.weights.blocks.at(index), team_);
    const BlockNorms original = norms_;
    if (o_.rotate) {
      std::fill(norms_.attn.begin(), norms_.attn.end(), 1.0f);
      std::fill(norms_.mlp.begin(), norms_.mlp.end(), 1.0f);
    }
    if (quant_) quant_->set_norms(norms_);
    if (full_) full_->set_norms(norms_);
    const bool kept = sink_.kept && sink_.kept(index, Unit::kQkv).has_value();
    for (Unit u : kUnits) {
      if (!kept || full_) load(index, u, original);
      if (kept)
        keep(index, u);
      else
        quantize(index, u, report);
    }
    if (calibration_) report.output_error = advance();
    report.seconds = since(start);
    if (!kept) sink_.block_done(index, norms_, report);
  }

 private:
  static double since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
  }

  // fn(first token, tokens) for every chunk.
  template <class Fn>
  void for_chunks(Fn fn) {
    for (int64_t t = 0; t < tokens_; t += chunk_) fn(t, std::min(chunk_, tokens_ - t));
  }

  // The unit's weights into w_, and to the full-precision runner.
  void load(int64_t index, Unit u, const BlockNorms& norms) {
    clock_->enter(Stage::kLoad);
    const LlamaBlock& block = model_.weights.blocks.at(index);
    if (o_.order_hidden && u == Unit::kGateUp) {
      work_->load(block.down, w_.get());
      order_ = hidden_order(*work_, w_.get(), c_.dim, c_.hidden);
    }
    work_->load(unit_weight(block, u), w_.get());
    if (o_.order_hidden) order_hidden(*work_, c_, u, w_.get(), order_);
    if (o_.rotate) rotate_unit(*work_, c_, u, w_.get(), norms, r1_, r2_);
    if (full_) full_->set(u, w_.get());
  }

  // A unit's inputs from the residual stream x, by one of the two models.
  static void inputs(BlockRunner& runner, Unit u, const float* x, float* to, int64_t n) {
    switch (u) {
      case Unit::kQkv: return runner.attn_input(x, to, n);
      case Unit::kO: return runner.attention(x, to, n);
      case Unit::kGateUp: return runner.mlp_input(x, to, n);
      case Unit::kDown: return runner.mlp(x, to, n);
    }
  }
  static void add_output(BlockRunner& runner, Unit u, const float* in, float* x, int64_t n) {
    if (u == Unit::kO) runner.add_attention(in, x, n);
    if (u == Unit::kDown) runner.add_mlp(in, x, n);
  }

  // Where the inputs of o or down of the tokens [t, t + n) are held, or null.
  Activations* hold(Unit u, int64_t t, int64_t n) {
    if (u == Unit::kO) return t + n <= shape_.held_o ? &hold_o_ : nullptr;
    if (u == Unit::kDown) return t + n <= shape_.held_down ? &hold_down_ : nullptr;
    return nullptr;
  }

  // Moves the quantised stream over o or down, once that is quantised: from its inputs if they were held,
  // else made again.
  void pass(Unit u, int64_t t, int64_t n, float* x) {
    Activations* held = hold(u, t, n);
    float* in = held ? held->open(t, n) : in_.get();
    if (!held) inputs(*quant_, u, x, in, n);
    add_output(*quant_, u, in, x, n);
  }

  // Tokens of the first sequences, of which couplings are made.
  int64_t probe() const {
    return seq_len_ * std::min({coupling_sequences(c_), chunk_ / seq_len_, tokens_ / seq_len_});
  }

  // Brings both streams to the inputs of a unit and, where asked, sums its statistics on the way.
  void gather(Unit u, bool sums) {
    if (!sums && u == Unit::kQkv) return;
    for_chunks([&](int64_t t, int64_t n) {
      clock_->enter(Stage::kForward);
      float* x = x_.open(t, n);
      if (u == Unit::kGateUp) {
        pass(Unit::kO, t, n, x);
        x_.close(t, n);
        if (!sums) return;
      }
      Activations* held = hold(u, t, n);
      float* in = held ? held->blank(t) : in_.get();
      if (sums || held) inputs(*quant_, u, x, in, n);
      if (held) held->close(t, n);
      float* x_full = full_ ? x_full_.open(t, n) : nullptr;
      if (full_) inputs(*full_, u, x_full, in_full_.get(), n);
      if (full_ && sums && o_.couple && u == Unit::kQkv && t == 0) {
        clock_->enter(Stage::kCouple);
        // On the GPU the host's threads have nothing to do until the sums are complete.
        coming_ = std::async(
            backend_.name() == "cuda" ? std::launch::async : std::launch::deferred,
            [this, qk = queries_and_keys(c_, backend_, *solver_, in_full_.get(), w_.get(), probe() / seq_len_,
                                         seq_len_)] { return couple_attention(c_, qk, seq_len_, team_); });
      }
      if (sums) {
        clock_->enter(Stage::kSums);
        solver_->add(in, in_full_.get(), x, x_full, n);
      }
      if (full_ && writes_residual(u)) {
        clock_->enter(Stage::kForward);
        add_output(*full_, u, in_full_.get(), x_full, n);
        x_full_.close(t, n);
      }
    });
    if (!sums) return;
    clock_->enter(Stage::kSums);
    solver_->finish();
  }

  // A unit that an earlier run finished.
  void keep(int64_t index, Unit u) {
    if (!calibration_) return;
    gather(u, false);
    clock_->enter(Stage::kLoad);
    Weight packed;
    packed.name = unit_name(index, u);
    packed.view = *sink_.kept(index, u);
    work_->load(packed, w_.get());
    quant_->set(u, w_.get());
  }

  void quantize(int64_t index, Unit u, BlockReport& report) {
    const auto start = Clock::now();
    const int64_t n = unit_rows(c_, u), k = unit_columns(c_, u);
    const std::string name = unit_name(index, u);
    coupling_ = {};
    if (calibration_) {
      solver_->begin(n, k, calibration_->samples, o_.corrects(), writes_residual(u));
      gather(u, true);
    } else {
      solver_->begin_identity(n, k);
    }
    clock_->enter(Stage::kFactor);
    LinearReport info;
    info.k = k;
    if (calibration_ && o_.covers(name)) info.damp = solver_->factor(o_.damp, o_.act_order);
    clock_->enter(Stage::kCouple);
    if (coming_.valid()) coupling_ = coming_.get();
    if (full_ && o_.couple && index == c_.layers - 1 && u == Unit::kDown)
      coupling_ = couple_output(model_, backend_, *solver_, o_.rotate ? &r1_ : nullptr,
                                x_full_.open(0, probe()), probe(), team_);
    clock_->enter(Stage::kLosses);
    std::vector<WeightShape> shapes;  // before a solve clears what no input reaches
    for (const Projection& p : projections(c_))
      if (p.unit == u) shapes.push_back(work_->shape(w_.get() + p.begin * k, (p.end - p.begin) * k));

    clock_->enter(Stage::kSolve);
    UnitResult result;
    std::vector<RowLoss> rows(n);
    if (o_.covers(name))
      solve(index, u, name, info, result, rows);
    else
      keep_unquantised(n, k, info, result);

    info.seconds = since(start);
    size_t at = 0;
    for (const Projection& p : projections(c_)) {
      if (p.unit != u) continue;
      info.name = p.name;
      info.n = p.end - p.begin;
      info.loss = summarize(rows, k, p.begin, p.end);
      info.weights = shapes[at++];
      report.linears.push_back(info);
    }
    sink_.unit(index, u, result);
    if (quant_) quant_->set(u, w_.get());
    if (sink_.progress) sink_.progress(index * 4 + int64_t(u) + 1, c_.layers * 4);
  }

  // w_ becomes the values that the quantised model computes with.
  void solve(int64_t index, Unit u, const std::string& name, LinearReport& info, UnitResult& result,
             std::vector<RowLoss>& rows) {
    const int64_t n = unit_rows(c_, u), k = unit_columns(c_, u);
    const Format4 format = o_.format_of(name);
    SolveOptions options = o_.solve;
    options.grid = format.grid;
    options.group = format.group;
    options.coupling = coupling_.blocks ? &coupling_ : nullptr;
    info.grid = grid_name(format.grid);
    info.group = format.group == 0 ? k : std::min(format.group, k);
    info.bits = grid_bits(format.grid);
    if (o_.seed_method) {
      const HessianFactor& f = solver_->fetch();
      if (!f.ok())
        throw Error(ErrorKind::kRuntime,
                    name + ": the Hessian cannot be factored, which the seed's method needs");
      SeedResult r = seed_solve(read_weights(n * k).data(), n, f, format.grid, format.group, team_);
      result.values = std::move(r.values);
      rows = std::move(r.rows);
    } else {
      QuantizedLinear q = solver_->solve(w_.get(), options);
      if (!q.fallback.empty()) log_warn("%s: %s", name.c_str(), q.fallback.c_str());
      rows = std::move(q.rows);
      info.damp = q.damp;
      info.sweeps = q.sweeps;
      info.fallback = q.fallback;
      clock_->enter(Stage::kStore);
      result.packed = solver_->packed();
    }
    if (sink_.solved && calibration_)
      sink_.solved({index, u, n, k, w_.get(), backend_, *solver_, options, result, rows});
    clock_->enter(Stage::kStore);
    if (o_.seed_method)
      write_weights(result.values);
    else
      solver_->values(w_.get());
  }

  void keep_unquantised(int64_t n, int64_t k, LinearReport& info, UnitResult& result) {
    info.grid = "f16";
    info.bits = 16;
    std::vector<float> w = read_weights(n * k);
    PackedWeight& p = result.packed;
    p.view = {.format = Format::kF16, .n = n, .k = k};
    p.data.resize(2 * w.size());
    uint16_t* half = reinterpret_cast<uint16_t*>(p.data.data());
    team_([&](Part part) {
      const auto [begin, end] = part.of(int64_t(w.size()), 1024);
      for (int64_t i = begin; i < end; ++i) w[i] = half_to_float(half[i] = float_to_half(w[i]));
    });
    p.view.data = p.data.data();
    write_weights(w);
  }

  std::vector<float> read_weights(int64_t count) {
    std::vector<float> w(count);
    backend_.read(w.data(), w_.bytes(), w.size() * sizeof(float));
    return w;
  }
  void write_weights(const std::vector<float>& w) {
    backend_.write(w_.bytes(), w.data(), w.size() * sizeof(float));
  }

  // The quantised stream through down; how far it is from the full-precision one.
  double advance() {
    double error = 0.0, total = 0.0;
    for_chunks([&](int64_t t, int64_t n) {
      clock_->enter(Stage::kForward);
      float* x = x_.open(t, n);
      pass(Unit::kDown, t, n, x);
      x_.close(t, n);
      if (!full_) return;
      clock_->enter(Stage::kLosses);
      const Distance d = solver_->distance(x, x_full_.open(t, n), n * c_.dim);
      error += d.difference_2;
      total += d.full_2;
    });
    return full_ ? error / total : 0.0;
  }

  const LlamaModel& model_;
  Backend& backend_;
  const Calibration* calibration_;
  const QuantizeOptions& o_;
  const QuantizeSink& sink_;
  const LlamaConfig& c_;
  const Team team_;
  std::unique_ptr<WeightWork> work_;
  std::unique_ptr<StageClock> clock_;
  std::unique_ptr<UnitSolver> solver_;
  const Rotation r1_, r2_;
  BlockNorms norms_;            // of the block in hand, 1 once folded
  std::vector<int32_t> order_;  // of its hidden channels
  RowCoupling coupling_;        // of the unit in hand
  Buffer w_;                    // (N, K) the unit in hand: original, rotated, then as quantised

  int64_t seq_len_ = 0, tokens_ = 0, chunk_ = 0;
  Weight rope_;
  std::unique_ptr<BlockRunner> quant_, full_;  // full_ only for the correction
  Activations x_, x_full_;                     // (T, D) residual streams
  WalkShape shape_{};
  Buffer in_, in_full_;              // (chunk, widest) inputs of a linear
  Buffer held_;                      // those that are held
  Activations hold_o_, hold_down_;   // (held_o, H hd), (held_down, F) in it: inputs of the quantised model
  std::future<RowCoupling> coming_;  // of the unit in hand
};

}  // namespace

void quantize_blocks(LlamaModel& m, Backend& backend, const QuantizedFrame& frame,
                     const Calibration* calibration, const QuantizeOptions& options,
                     const QuantizeSink& sink) {
  assert(calibration || options.solve.rtn);
  BlockWalk walk(m, backend, frame, calibration, options, sink);
  for (int64_t l = 0; l < m.config.layers; ++l) walk.block(l);
  if (!sink.stage) return;
  const auto seconds = walk.clock().seconds();
  for (int s = 0; s < kStages; ++s)
    sink.stage(std::string("blocks: ") + stage_name(Stage(s)), seconds[size_t(s)]);
}

}  // namespace q4s
