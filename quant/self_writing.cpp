#include "quant/self_writing.h"

#include <algorithm>

#include "kernels/philox.h"
#include "models/session.h"
#include "runtime/sampler.h"
#include "runtime/tokenizer.h"

namespace q4s {
namespace {

constexpr int64_t kMostTogether = 128;
constexpr int64_t kMostCacheBytes = int64_t(24) << 30;

// Positions of the first half of a sequence, where another group starts.
int64_t half_of(int64_t seq_len) { return ceil_div(seq_len, 2); }

class Writer {
 public:
  Writer(LlamaModel& model, Backend& backend, const WritingPlan& plan, const SessionOptions& options,
         Calibration& c, const std::function<void(int64_t, int64_t)>& progress)
      : model_(model),
        backend_(backend),
        plan_(plan),
        session_(model, backend, options),
        c_(c),
        progress_(progress) {
    whole_.temperature = 1;
    whole_.top_k = 0;
    whole_.top_p = 1;
    whole_.min_p = 0;
    whole_.seed = c.seed;
  }

  void run() {
    const int64_t first = plan_.overlaps ? half_of(c_.seq_len) : c_.seq_len - 1,
                  second = c_.seq_len - 1 - first;
    for (int64_t g = 0; g < plan_.groups; ++g) {
      begin(g);
      advance(std::min(first, second));  // with the group before, if it is there
      retire(g - 1);
      advance(first - std::min(first, second));
    }
    advance(second);
  }

 private:
  struct Sequence {
    int64_t index, slot, length;  // tokens that stand in c_
    int32_t token;                // the last of them
    Sampler sampler;
  };

  void begin(int64_t group) {
    for (int64_t lane = 0; lane < plan_.lanes; ++lane) {
      const int64_t index = group * plan_.lanes + lane;
      if (index >= c_.samples) break;
      const int32_t bos = model_.tokenizer->bos_id();
      const double random = philox_uniform(c_.seed ^ 1, uint64_t(index), 0);
      const int32_t token = bos >= 0 ? bos : int32_t(random * model_.tokenizer->vocab_size());
      const int64_t slot = plan_.slot(group, lane);
      session_.truncate(int(slot), 0);
      alive_.push_back({index, slot, 0, token, Sampler(whole_, uint64_t(index))});
      keep(alive_.back(), token);
    }
    progress_(done_, c_.samples * c_.seq_len);
  }
  void retire(int64_t group) {
    std::erase_if(alive_, [&](const Sequence& s) { return s.index / plan_.lanes <= group; });
  }
  void keep(Sequence& s, int32_t token) {
    s.token = c_.tokens[s.index * c_.seq_len + s.length++] = token;
    ++done_;
  }

  // Every living sequence by so many tokens.
  void advance(int64_t steps) {
    if (steps == 0 || alive_.empty()) return;
    if (backend_.name() == "cuda") {  // drawn on the device: only tokens come back
      std::vector<Session::Next> next;
      for (Sequence& s : alive_) next.push_back({int(s.slot), s.token, &s.sampler});
      session_.decode(next, steps, [&](int64_t, std::span<const int32_t> drawn) {
        for (size_t r = 0; r < alive_.size(); ++r) keep(alive_[r], drawn[r]);
        progress_(done_, c_.samples * c_.seq_len);
        return true;
      });
      return;
    }
    const int64_t vocab = model_.config.vocab, rows = int64_t(alive_.size());
    std::vector<std::pair<int, int32_t>> step(rows);
    std::vector<int32_t> drawn(rows);
    for (int64_t i = 0; i < steps; ++i) {
      for (int64_t r = 0; r < rows; ++r) step[r] = {int(alive_[r].slot), alive_[r].token};
      const std::span<const float> logits = session_.step(step);
      backend_.pool().run([&](Part part) {
        const auto [begin, end] = part.of(rows);
        for (int64_t r = begin; r < end; ++r)
          drawn[r] = alive_[r].sampler.sample(logits.subspan(r * vocab, vocab));
      });
      for (int64_t r = 0; r < rows; ++r) keep(alive_[r], drawn[r]);
      progress_(done_, c_.samples * c_.seq_len);
    }
  }

  LlamaModel& model_;
  Backend& backend_;
  const WritingPlan plan_;
  Session session_;
  Calibration& c_;
  const std::function<void(int64_t, int64_t)>& progress_;
  SamplerOptions whole_;
  std::vector<Sequence> alive_;
  int64_t done_ = 0;
};

}  // namespace

WritingPlan WritingPlan::of(int64_t samples, int64_t lanes, bool overlaps) {
  const int64_t groups = ceil_div(samples, lanes);
  return {ceil_div(samples, groups), groups, overlaps};  // groups of one size
}

int64_t WritingPlan::steps(int64_t seq_len) const {
  return overlaps ? (groups + 1) * half_of(seq_len) : groups * seq_len;
}

// Overlapping, units are half sequences and a lane has three. While a group is in its second half it fills
// two; the next starts in the third and grows into the first of the next lane, which that lane's old sequence
// has just left. So starts move up by one unit every two groups.
int64_t WritingPlan::slot(int64_t group, int64_t lane) const {
  return overlaps ? 3 * lane + group / 2 + group % 2 * 2 : lane;
}
int64_t WritingPlan::slots() const {
  if (!overlaps) return lanes;
  return 1 + std::max(slot(groups - 1, lanes - 1), slot(std::max<int64_t>(groups - 2, 0), lanes - 1));
}

WritingPlan writing_plan(const LlamaConfig& c, int64_t samples, int64_t seq_len) {
  const int64_t position = 4 * c.layers * c.kv_dim();  // bytes of its key and value in fp16
  const WritingPlan plain = WritingPlan::of(
      samples, std::clamp<int64_t>(kMostCacheBytes / (position * seq_len), 1, kMostTogether), false);
  const auto bytes = [&](const WritingPlan& p) {
    return position * ((p.slots() - 1) * half_of(seq_len) + seq_len);
  };
  WritingPlan two = WritingPlan::of(samples, kMostTogether / 2, true);
  while (two.lanes > 1 && bytes(two) > kMostCacheBytes) two = WritingPlan::of(samples, two.lanes - 1, true);
  return seq_len > 2 && two.steps(seq_len) < plain.steps(seq_len) ? two : plain;
}

Calibration calibration_self_written(LlamaModel& model, Backend& backend, int64_t samples, int64_t seq_len,
                                     uint64_t seed, const std::function<void(int64_t, int64_t)>& progress,
                                     std::optional<WritingPlan> given) {
  Calibration c{"self-written", "", samples, seq_len, seed, std::vector<int32_t>(samples * seq_len)};
  WritingPlan plan = given ? *given : writing_plan(model.config, samples, seq_len);
  const auto options = [&] {
    return SessionOptions{.ctx = seq_len,
                          .sequences = int(plan.slots()),
                          .chunk = 1,
                          .kv = KvType::kF16,
                          .together = int(plan.together()),
                          .stride = plan.overlaps ? half_of(seq_len) : 0};
  };
  fill_rope(model, seq_len);
  const std::optional<size_t> free = backend.free_bytes();
  while (plan.lanes > 1 && free && Session::plan(model, backend, options()).total() > *free)
    plan = WritingPlan::of(samples, ceil_div(plan.lanes, 2), plan.overlaps);
  Writer(model, backend, plan, options(), c, progress).run();
  seal(c);
  return c;
}

}  // namespace q4s
