#include "quant/compare.h"

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>

#include "kernels/linear.h"
#include "quant/seed.h"
#include "runtime/log.h"

namespace q4s {
namespace {

// Bits and groups that the seed's observe tries in turn.
const Format4 kLadder[] = {{GridKind::kSym7, 64},
                           {GridKind::kSym7, 32},
                           {GridKind::kInt8, 128},
                           {GridKind::kInt8, 64},
                           {GridKind::kInt8, 32}};

struct Retry {
  std::vector<float> values;  // rows of one projection
  double loss = 0;            // against what was handed in last: what the seed prints
  double honest = 0;          // against the full-precision weights
  Format4 format;
};

// Climbs the ladder until the loss is below half of the first. The seed hands in the rows quantised so far,
// we the full-precision ones.
Retry climb(const float* w, const std::vector<float>& quantised, double first, const Format4& format,
            int64_t n, const HessianFactor& f, bool as_the_seed, const Team& team) {
  Retry r{quantised, first, 0, format};
  for (const Format4& step : kLadder) {
    if (r.loss < first / 2) break;
    const std::vector<float> input = as_the_seed ? r.values : std::vector<float>(w, w + n * f.k);
    SeedResult s = seed_solve(input.data(), n, f, step.grid, step.group, team);
    r.loss = summarize(s.rows, f.k, 0, n).loss;
    r.values = std::move(s.values);
    r.format = step;
  }
  r.honest = summarize(row_losses(w, r.values.data(), f, n, team), f.k, 0, n).loss;
  return r;
}

// The projections of largest loss so far, with both retries.
class WorstSeen {
 public:
  struct Entry {
    int64_t block;
    Projection projection;
    double first;
    Retry seed, right;
  };
  explicit WorstSeen(int64_t count) : count_(count) {}

  void see(const SolvedUnit& s, const LlamaConfig& c, const Team& team) {
    const int64_t k = s.k;
    for (const Projection& p : projections(c)) {
      if (p.unit != s.unit) continue;
      const double loss = summarize(s.rows, k, p.begin, p.end).loss;
      if (int64_t(entries_.size()) == count_ && !(loss > entries_.back().first)) continue;
      const int64_t n = p.end - p.begin;
      std::vector<float> w(n * k);
      s.backend.read(w.data(), reinterpret_cast<const std::byte*>(s.w + p.begin * k),
                     w.size() * sizeof(float));
      const std::vector<float> q(s.result.values.begin() + p.begin * k, s.result.values.begin() + p.end * k);
      const HessianFactor& f = s.solver.fetch();
      const Format4 format{s.options.grid, s.options.group};
      const auto retry = [&](bool as_the_seed) {
        return climb(w.data(), q, loss, format, n, f, as_the_seed, team);
      };
      entries_.push_back({s.block, p, loss, retry(true), retry(false)});
      std::stable_sort(entries_.begin(), entries_.end(),
                       [](const Entry& a, const Entry& b) { return a.first > b.first; });
      if (int64_t(entries_.size()) > count_) entries_.pop_back();
    }
  }
  const std::vector<Entry>& entries() const { return entries_; }

 private:
  int64_t count_;
  std::vector<Entry> entries_;
};

void sum_up(VersionResult& v) {
  v.largest = v.sum = 0;
  for (const BlockReport& b : v.blocks) {
    for (const LinearReport& l : b.linears) {
      v.sum += l.loss.loss;
      if (l.loss.loss > v.largest) {
        v.largest = l.loss.loss;
        v.at = "blk." + std::to_string(b.block) + "." + l.name;
      }
    }
  }
}

// Bits a weight of what was quantised: codes, fp16 scales, and zero points where the grid has them.
double bits_of(const std::vector<BlockReport>& blocks) {
  double bits = 0, weights = 0;
  for (const BlockReport& b : blocks) {
    for (const LinearReport& l : b.linears) {
      const double scale = l.grid == grid_name(GridKind::kAsym) ? 20 : 16;
      bits += double(l.n) * (l.bits * double(l.k) + scale * double(ceil_div(l.k, l.group)));
      weights += double(l.n * l.k);
    }
  }
  return bits / weights;
}

}  // namespace

AnalysisModel::AnalysisModel(const LlamaModel& source, const QuantizedFrame& f) {
  const LlamaConfig& c = model_.config = f.config;
  model_.path = source.path;
  model_.kind = "analysis";
  model_.tokenizer = source.tokenizer;
  LlamaWeights& w = model_.weights;
  w.embed.name = "embed";
  w.embed.view = f.embed.view;
  if (!c.tied) {
    w.head.name = "head";
    w.head.view = f.head.view;
  }
  w.final_norm = make_weight_f32("final_norm", 1, c.dim, f.final_norm);
  if (c.rotated) {
    w.rotation_signs = make_weight_f32("rotation.signs", 1, c.dim, f.rotation.signs);
    w.rotation_factor = make_weight_f32("rotation.factor", f.rotation.m, f.rotation.m, f.rotation.factor);
  }
  w.blocks.resize(c.layers);
  for (LlamaBlock& b : w.blocks) set_row_roles(b, c);
}

Weight& AnalysisModel::unit(int64_t block, Unit u) {
  LlamaBlock& b = model_.weights.blocks.at(block);
  return u == Unit::kQkv ? b.qkv : u == Unit::kO ? b.o : u == Unit::kGateUp ? b.gate_up : b.down;
}

void AnalysisModel::set(int64_t block, Unit u, std::vector<float> values) {
  Weight& w = unit(block, u);
  const RowRoles roles = w.roles;
  w = make_weight_f32(unit_name(block, u), unit_rows(model_.config, u), unit_columns(model_.config, u),
                      std::move(values));
  w.roles = roles;
}

void AnalysisModel::set_rows(int64_t block, Unit u, int64_t begin, const std::vector<float>& values) {
  Weight& w = unit(block, u);
  std::memcpy(w.bytes.data() + begin * w.view.k * sizeof(float), values.data(),
              values.size() * sizeof(float));
  w.device.reset();  // an old copy
}

void AnalysisModel::set_norms(int64_t block, const BlockNorms& b) {
  LlamaBlock& to = model_.weights.blocks.at(block);
  to.attn_norm = make_weight_f32("attn_norm", 1, model_.config.dim, b.attn);
  to.mlp_norm = make_weight_f32("mlp_norm", 1, model_.config.dim, b.mlp);
}

void compare_grids(LlamaModel& source, Backend& backend, const Calibration& calibration, const PplText& text,
                   const QuantizeOptions& ours, int64_t observe,
                   const std::function<void(const VersionResult&)>& done,
                   const std::function<void(const std::string&, int64_t, int64_t)>& progress) {
  const LlamaConfig& c = source.config;
  const Team team = [&](const std::function<void(Part)>& fn) { backend.pool().run(fn); };
  const auto session_of = [&](LlamaModel& m) {
    return std::make_unique<Session>(m, backend,
                                     SessionOptions{.ctx = text.ctx, .kv = default_kv(m, backend)});
  };
  const std::unique_ptr<Session> reference = session_of(source);
  const auto measure = [&](VersionResult& v, LlamaModel& m) {
    sum_up(v);
    v.bits = bits_of(v.blocks);
    const std::unique_ptr<Session> session = session_of(m);
    v.output = perplexity(text, *session, reference.get(),
                          [&](int64_t w, double) { progress(v.name + ", output", w, text.chunks); });
    done(v);
  };
  const auto run = [&](const std::string& name, const QuantizeOptions& o, WorstSeen* observer) {
    VersionResult v;
    v.name = name;
    const QuantizedFrame frame = quantize_frame(source, o, team);
    AnalysisModel analysis(source, frame);
    QuantizeSink sink;
    sink.unit = [&](int64_t block, Unit u, UnitResult& r) {
      if (r.values.empty()) {
        r.values.resize(r.packed.view.n * r.packed.view.k);
        dequantize_rows(r.packed.view, 0, r.packed.view.n, r.values.data());
      }
      analysis.set(block, u, std::move(r.values));
    };
    sink.block_done = [&](int64_t block, const BlockNorms& w, const BlockReport& b) {
      analysis.set_norms(block, w);
      v.blocks.push_back(b);
    };
    sink.progress = [&](int64_t at, int64_t total) { progress(name, at, total); };
    if (observer) sink.solved = [&](const SolvedUnit& s) { observer->see(s, c, team); };
    quantize_blocks(source, backend, frame, &calibration, o, sink);
    measure(v, analysis.model());
    if (!observer) return;

    for (const bool as_the_seed : {true, false}) {
      VersionResult w = v;
      w.name = name + (as_the_seed ? " + observe as written" : " + observe, right");
      for (const WorstSeen::Entry& e : observer->entries()) {
        const Retry& retry = as_the_seed ? e.seed : e.right;
        analysis.set_rows(e.block, e.projection.unit, e.projection.begin, retry.values);
        for (LinearReport& l : w.blocks[e.block].linears) {
          if (l.name != e.projection.name) continue;
          l.loss.loss = retry.honest;
          l.group = retry.format.group == 0 ? l.k : std::min(retry.format.group, l.k);
          l.grid = grid_name(retry.format.grid);
          l.bits = grid_bits(retry.format.grid);
        }
      }
      if (as_the_seed) {  // as printed: retried linears with the loss against what was quantised before
        VersionResult printed = w;
        for (const WorstSeen::Entry& e : observer->entries())
          for (LinearReport& l : printed.blocks[e.block].linears)
            if (l.name == e.projection.name) l.loss.loss = e.seed.loss;
        sum_up(printed);
        w.logged = printed.largest;
      }
      measure(w, analysis.model());
    }
  };

  QuantizeOptions seed = ours;
  seed.seed_method = true;
  seed.rotate = seed.order_hidden = false;
  seed.damp = 0.01;
  const std::pair<const char*, GridKind> seeds[] = {{"seed: zero points", GridKind::kAsym},
                                                    {"seed: -7..7", GridKind::kSym7},
                                                    {"seed: -8..7", GridKind::kSym8},
                                                    {"seed: half step", GridKind::kHalf}};
  for (const auto& [name, grid] : seeds) {
    seed.solve.grid = grid;
    WorstSeen observer(observe);
    run(name, seed, grid == GridKind::kSym7 && observe > 0 ? &observer : nullptr);
  }
  run("ours", ours, nullptr);
}

std::string table_head() {
  return "| version | bits/weight | largest error | at | sum | PPL | KL |\n|---|---|---|---|---|---|---|\n";
}

std::string table_row(const VersionResult& v) {
  const std::string logged = v.logged > 0 ? strprintf(" (printed: %.3g)", v.logged) : "";
  return strprintf("| %s | %.3f | %.4g%s | %s | %.4g | %.2f | %.4f |\n", v.name.c_str(), v.bits, v.largest,
                   logged.c_str(), v.at.c_str(), v.sum, v.output.ppl, v.output.kl_mean);
}

std::string to_json(const std::vector<VersionResult>& all) {
  nlohmann::ordered_json j = {{"schema", 1}, {"versions", nlohmann::ordered_json::array()}};
  for (const VersionResult& v : all) {
    nlohmann::ordered_json one = {{"name", v.name},
                                  {"bits_per_weight", v.bits},
                                  {"largest", v.largest},
                                  {"at", v.at},
                                  {"sum", v.sum},
                                  {"logged", v.logged},
                                  {"ppl", v.output.ppl},
                                  {"ref_ppl", v.output.ref_ppl},
                                  {"kl_mean", v.output.kl_mean},
                                  {"kl_stderr", v.output.kl_stderr},
                                  {"top1", v.output.top1}};
    one["blocks"] = nlohmann::ordered_json::array();
    for (const BlockReport& b : v.blocks) one["blocks"].push_back(nlohmann::ordered_json::parse(to_json(b)));
    j["versions"].push_back(std::move(one));
  }
  return j.dump(1) + "\n";
}

}  // namespace q4s
