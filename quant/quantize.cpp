#include "quant/quantize.h"

#include <algorithm>
#include <cassert>
#include <chrono>

#include "kernels/embed.h"
#include "kernels/half.h"
#include "kernels/linear.h"
#include "quant/block_runner.h"
#include "quant/buffer.h"
#include "quant/seed.h"
#include "quant/unit_solver.h"
#include "runtime/error.h"
#include "runtime/log.h"

namespace q4s {
namespace {

using Clock = std::chrono::steady_clock;
double since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Tokens of a forward step: enough to fill the device. On the CPU that does not depend on the model.
constexpr int64_t kChunk = 4096;
constexpr int64_t kMostChunk = 32768;
constexpr int64_t kChunkValues = int64_t(1) << 26;  // of the widest activation

int64_t chunk_tokens(const LlamaConfig& c, bool gpu, int64_t samples, int64_t seq_len) {
  const int64_t tokens = gpu ? std::clamp(kChunkValues / (2 * c.hidden), kChunk, kMostChunk) : kChunk;
  return std::clamp<int64_t>(tokens / seq_len, 1, samples) * seq_len;  // whole sequences
}

bool writes_residual(Unit u) { return u == Unit::kO || u == Unit::kDown; }

// Walks one model; see quantize_blocks.
class BlockWalk {
 public:
  BlockWalk(LlamaModel& model, Backend& backend, const QuantizedFrame& frame, const Calibration* calibration,
            const QuantizeOptions& options, const QuantizeSink& sink)
      : model_(model),
        backend_(backend),
        frame_(frame),
        calibration_(calibration),
        o_(options),
        sink_(sink),
        c_(frame.config),
        team_([&backend](const std::function<void(Part)>& fn) { backend.pool().run(fn); }) {
    if (!calibration) return;
    solver_ = make_unit_solver(backend);
    samples_ = calibration->samples;
    seq_len_ = calibration->seq_len;
    tokens_ = samples_ * seq_len_;
    chunk_ = chunk_tokens(c_, backend.name() == "cuda", samples_, seq_len_);
    rope_ = make_weight_f32("rope", seq_len_, c_.head_dim, rope_table(c_, seq_len_));
    backend.load(rope_);
    quant_ = std::make_unique<BlockRunner>(c_, backend, rope_, seq_len_, chunk_);
    x_ = Buffer(backend, tokens_ * c_.dim, "the residual stream");
    hold_ = Buffer(backend, tokens_ * std::max(c_.q_dim(), c_.hidden), "inputs of a linear");
    const int64_t widest = std::max({c_.dim, c_.q_dim(), c_.hidden});
    in_ = Buffer(backend, chunk_ * c_.dim, "inputs of a linear");
    embed(frame.embed.view, x_);
    if (o_.corrects()) {
      full_ = std::make_unique<BlockRunner>(c_, backend, rope_, seq_len_, chunk_);
      x_full_ = Buffer(backend, tokens_ * c_.dim, "the full-precision residual stream");
      in_full_ = Buffer(backend, chunk_ * widest, "full-precision inputs of a linear");
      embed(model.weights.embed.view, x_full_);
    }
  }

  // Seconds so far. The GPU works behind the host: its forwards and sums end where factoring begins.
  struct Stages {
    double load = 0, sums = 0, factor = 0, solve = 0, store = 0;
  };
  const Stages& stages() const { return stages_; }

  void block(int64_t index) {
    const auto start = Clock::now();
    BlockReport report;
    report.block = index;
    BlockWeights w = unpack_block(model_.weights.blocks.at(index), team_);
    if (o_.rotate) rotate_block(w, c_, frame_.rotation, r2(), team_);
    if (calibration_) {
      if (full_) full_->set(w);
      quant_->set(w);
    }
    stages_.load += since(start);
    const bool kept = sink_.kept && sink_.kept(index, Unit::kQkv).has_value();
    walk_unit(index, Unit::kQkv, w, kept, report);
    walk_unit(index, Unit::kO, w, kept, report);
    walk_unit(index, Unit::kGateUp, w, kept, report);
    walk_unit(index, Unit::kDown, w, kept, report);
    const auto last = Clock::now();
    if (calibration_) report.output_error = advance();
    stages_.sums += since(last);
    report.seconds = since(start);
    if (!kept) sink_.block_done(index, w, report);
  }

 private:
  Rotation r2() const { return make_rotation(c_.head_dim, o_.seed + 1); }

  void embed(const WeightView& table, Buffer& x) {
    // An untied table of the file is rotated already.
    const bool turned = &table == &frame_.embed.view && !c_.rotated;
    std::vector<float> rows(chunk_ * c_.dim);
    for_chunks([&](int64_t t, int64_t n) {
      team_([&](Part part) { embed_cpu({table, &calibration_->tokens[t], rows.data(), n}, part); });
      if (o_.rotate && !turned) rotate_rows(frame_.rotation, rows.data(), n, team_);
      backend_.write(reinterpret_cast<std::byte*>(x.get() + t * c_.dim), rows.data(),
                     sizeof(float) * n * c_.dim);
      backend_.read(rows.data(), reinterpret_cast<const std::byte*>(x.get() + t * c_.dim),
                    sizeof(float));  // waits
    });
  }

  // fn(first token, tokens) for every chunk.
  template <class Fn>
  void for_chunks(Fn fn) {
    for (int64_t t = 0; t < tokens_; t += chunk_) fn(t, std::min(chunk_, tokens_ - t));
  }

  // Brings both streams to the inputs of a unit and, where asked, sums its statistics on the way. The inputs
  // of o and down stay in hold_, since the stream can only move on once the unit is quantised.
  void gather(Unit u, bool sums) {
    const int64_t k = unit_columns(c_, u), d = c_.dim;
    if (!sums && u == Unit::kQkv) return;
    float* in_full = in_full_.get();
    for_chunks([&](int64_t t, int64_t n) {
      float* x = x_.get() + t * d;
      float* x_full = full_ ? x_full_.get() + t * d : nullptr;
      float* in = writes_residual(u) ? hold_.get() + t * k : in_.get();
      switch (u) {
        case Unit::kQkv:
          quant_->attn_input(x, in, n);
          if (full_) full_->attn_input(x_full, in_full, n);
          break;
        case Unit::kO:
          quant_->attention(x, in, n);
          if (full_) full_->attention(x_full, in_full, n);
          break;
        case Unit::kGateUp:
          quant_->add_attention(hold_.get() + t * c_.q_dim(), x, n);
          if (!sums) return;
          quant_->mlp_input(x, in, n);
          if (full_) full_->mlp_input(x_full, in_full, n);
          break;
        case Unit::kDown:
          quant_->mlp(x, in, n);
          if (full_) full_->mlp(x_full, in_full, n);
          break;
      }
      if (sums) solver_->add(in, in_full, x, x_full, n);
      if (full_ && u == Unit::kO) full_->add_attention(in_full, x_full, n);
      if (full_ && u == Unit::kDown) full_->add_mlp(in_full, x_full, n);
    });
  }

  void walk_unit(int64_t index, Unit u, BlockWeights& w, bool kept, BlockReport& report) {
    const int64_t n = unit_rows(c_, u), k = unit_columns(c_, u);
    const std::string name = unit_name(index, u);
    UnitResult result;
    if (kept) {
      if (calibration_) {
        gather(u, false);
        result.values.resize(n * k);
        dequantize_rows(*sink_.kept(index, u), 0, n, result.values.data());
        write_back(u, std::move(result.values));
      }
      return;
    }
    const auto start = Clock::now();
    if (calibration_) {
      solver_->begin(n, k, samples_, o_.corrects(), writes_residual(u));
      gather(u, true);
      solver_->wait();
    }
    auto lap = [last = start](double& stage) mutable {
      const auto now = Clock::now();
      stage += std::chrono::duration<double>(now - last).count();
      last = now;
    };
    lap(stages_.sums);
    const std::vector<float>& source = unit_weights(w, u);
    LinearReport info;
    info.k = k;
    std::vector<RowLoss> rows;
    if (!o_.covers(name)) {
      result = keep_unquantised(source, n, k);
      info.grid = "f16";
      info.bits = 16;
      rows.resize(n);
    } else {
      if (calibration_) info.damp = solver_->factor(o_.damp, o_.act_order);
      lap(stages_.factor);
      const Format4 format = o_.format_of(name);
      SolveOptions solve_options = o_.solve;
      solve_options.grid = format.grid;
      solve_options.group = format.group;
      info.grid = grid_name(format.grid);
      info.group = format.group == 0 ? k : std::min(format.group, k);
      info.bits = grid_bits(format.grid);
      if (o_.seed_method) {
        const HessianFactor& f = solver_->fetch();
        if (!f.ok())
          throw Error(ErrorKind::kRuntime,
                      name + ": the Hessian cannot be factored, which the seed's method needs");
        SeedResult r = seed_solve(source.data(), n, f, format.grid, format.group, team_);
        result.values = std::move(r.values);
        rows = std::move(r.rows);
        lap(stages_.solve);
      } else {
        QuantizedLinear q = calibration_ ? solver_->solve(source.data(), solve_options)
                                         : solve({source.data(), nullptr, nullptr, n, k}, no_statistics(k),
                                                 solve_options, team_);
        lap(stages_.solve);
        if (!q.fallback.empty()) log_warn("%s: %s", name.c_str(), q.fallback.c_str());
        result.values.resize(n * k);
        team_([&](Part part) {
          const auto [begin, end] = part.of(n);
          q.dequantize(begin, end, &result.values[begin * k]);
        });
        result.packed = pack(q);
        rows = std::move(q.rows);
        info.damp = q.damp;
        info.sweeps = q.sweeps;
        info.fallback = q.fallback;
      }
      if (sink_.solved && calibration_)
        sink_.solved({index, u, n, k, source, *solver_, solve_options, result, rows});
    }
    info.seconds = since(start);
    for (const Projection& p : projections(c_)) {
      if (p.unit != u) continue;
      info.name = p.name;
      info.n = p.end - p.begin;
      info.loss = summarize(rows, k, p.begin, p.end);
      info.weights = weight_shape(&source[p.begin * k], info.n * k, team_);
      report.linears.push_back(info);
    }
    sink_.unit(index, u, result);
    if (calibration_) write_back(u, std::move(result.values));
    lap(stages_.store);
    if (sink_.progress) sink_.progress(index * 4 + int64_t(u) + 1, c_.layers * 4);
  }

  // For plain rounding without calibration: H = I.
  static HessianFactor no_statistics(int64_t k) {
    HessianFactor f;
    f.k = k;
    f.h.resize(k * k);
    for (int64_t j = 0; j < k; ++j) f.h[j * (k + 1)] = 1.0f;
    f.dead.assign(k, 0);
    return f;
  }

  UnitResult keep_unquantised(const std::vector<float>& w, int64_t n, int64_t k) {
    UnitResult r;
    r.packed.view = {.format = Format::kF16, .n = n, .k = k};
    r.packed.data.resize(2 * w.size());
    uint16_t* half = reinterpret_cast<uint16_t*>(r.packed.data.data());
    r.values.resize(w.size());
    for (size_t i = 0; i < w.size(); ++i) {
      half[i] = float_to_half(w[i]);
      r.values[i] = half_to_float(half[i]);
    }
    r.packed.view.data = r.packed.data.data();
    return r;
  }

  void write_back(Unit u, std::vector<float> values) {
    switch (u) {
      case Unit::kQkv:
        quant_->set_qkv(std::move(values));
        break;
      case Unit::kO:
        quant_->set_o(std::move(values));
        break;
      case Unit::kGateUp:
        quant_->set_gate_up(std::move(values));
        break;
      case Unit::kDown:
        quant_->set_down(std::move(values));
        break;
    }
  }

  // The quantised stream through down; how far it is from the full-precision one.
  double advance() {
    double error = 0.0, total = 0.0;
    for_chunks([&](int64_t t, int64_t n) {
      float* x = x_.get() + t * c_.dim;
      quant_->add_mlp(hold_.get() + t * c_.hidden, x, n);
      if (!full_) return;
      const Distance d = solver_->distance(x, x_full_.get() + t * c_.dim, n * c_.dim);
      error += d.difference_2;
      total += d.full_2;
    });
    return full_ ? error / total : 0.0;
  }

  LlamaModel& model_;
  Backend& backend_;
  const QuantizedFrame& frame_;
  const Calibration* calibration_;
  const QuantizeOptions& o_;
  const QuantizeSink& sink_;
  const LlamaConfig& c_;
  const Team team_;
  int64_t samples_ = 0, seq_len_ = 0, tokens_ = 0, chunk_ = 0;
  Weight rope_;
  std::unique_ptr<UnitSolver> solver_;
  std::unique_ptr<BlockRunner> quant_, full_;  // full_ only for the correction
  Buffer x_, x_full_;                          // (T, D) residual streams
  Buffer hold_;                                // (T, H hd) or (T, F) inputs of o or down
  Buffer in_, in_full_;                        // (chunk, widest) inputs of a linear
  Stages stages_;
};

}  // namespace

int64_t unit_rows(const LlamaConfig& c, Unit u) {
  return u == Unit::kQkv ? c.qkv_dim() : u == Unit::kGateUp ? 2 * c.hidden : c.dim;
}
int64_t unit_columns(const LlamaConfig& c, Unit u) {
  return u == Unit::kO ? c.q_dim() : u == Unit::kDown ? c.hidden : c.dim;
}

std::vector<float>& unit_weights(BlockWeights& b, Unit u) {
  switch (u) {
    case Unit::kQkv:
      return b.qkv;
    case Unit::kO:
      return b.o;
    case Unit::kGateUp:
      return b.gate_up;
    case Unit::kDown:
      break;
  }
  return b.down;
}

std::string unit_name(int64_t block, Unit u) {
  static constexpr const char* kNames[] = {"qkv", "o", "gate_up", "down"};
  return "blk." + std::to_string(block) + "." + kNames[int(u)];
}

std::vector<Projection> projections(const LlamaConfig& c) {
  const int64_t q = c.q_dim(), kv = c.kv_dim(), f = c.hidden;
  return {{"q_proj", Unit::kQkv, 0, q},
          {"k_proj", Unit::kQkv, q, q + kv},
          {"v_proj", Unit::kQkv, q + kv, q + 2 * kv},
          {"o_proj", Unit::kO, 0, c.dim},
          {"gate_proj", Unit::kGateUp, 0, f},
          {"up_proj", Unit::kGateUp, f, 2 * f},
          {"down_proj", Unit::kDown, 0, c.dim}};
}

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

void quantize_blocks(LlamaModel& m, Backend& backend, const QuantizedFrame& frame,
                     const Calibration* calibration, const QuantizeOptions& options,
                     const QuantizeSink& sink) {
  assert(calibration || options.solve.rtn);
  BlockWalk walk(m, backend, frame, calibration, options, sink);
  for (int64_t l = 0; l < m.config.layers; ++l) walk.block(l);
  if (!sink.stage) return;
  const auto& t = walk.stages();
  sink.stage("blocks: load", t.load);
  sink.stage("blocks: forward, sums", t.sums);
  sink.stage("blocks: factor", t.factor);
  sink.stage("blocks: solve", t.solve);
  sink.stage("blocks: report, store", t.store);
}

QuantizePlan plan_quantize(const LlamaConfig& c, const QuantizeOptions& o, int64_t samples, int64_t seq_len) {
  const int64_t k = std::max({c.dim, c.q_dim(), c.hidden}), tokens = samples * seq_len,
                streams = o.corrects() ? 2 : 1;
  const int64_t block = c.linear_weights() / c.layers;
  const int64_t widest = std::max({c.qkv_dim() * c.dim, c.dim * c.q_dim(), 2 * c.hidden * c.dim});
  const int64_t chunk = samples ? std::clamp<int64_t>(kChunk / seq_len, 1, samples) * seq_len : 0;
  QuantizePlan p;
  p.block = 4 * block * (samples ? 1 + streams : 1) +
            5 * 4 * widest;  // source, runners; the solver's copies of a unit
  p.hessian = 4 * k * k * (streams == 2 ? 3 : 2) + 16 * k * k;  // H, U, D; two f64 matrices while factoring
  p.activations = 4 * tokens * (streams * c.dim + std::max(c.q_dim(), c.hidden));
  p.forward = 4 * streams * chunk * (2 * c.hidden + c.hidden + 2 * c.dim + 2 * c.kv_dim());
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
      unpack_rows(w, i, std::min(w.view.n, i + kSlab), team);
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
