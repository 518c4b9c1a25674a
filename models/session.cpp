#include "models/session.h"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <limits>
#include <numeric>

#include "runtime/error.h"
#include "runtime/plan.h"

namespace q4s {

// One graph, bound to the session's arena, with staging for its inputs.
struct Session::Plan {
  Graph graph;
  Inputs in;
  Tensor* logits;
  size_t arena;
  std::vector<int32_t> token, sequence, position, wanted;

  Plan(const LlamaModel& m, const Backend& b, Counts max)
      : graph(max),
        logits(&build_llama(graph, m.config, m.weights, in, {0, m.config.layers}, b.fuses())),
        arena(graph.plan()) {}
};

// A step of feed_steps(): the logits of its wanted items lie in plan.logits, in order.
struct Session::Fed {
  const Plan& plan;
  std::span<const TokenAt> batch;
  std::span<const int32_t> wanted;
  int64_t from;  // which of the tokens fed is the first of batch
};

namespace {

// Bytes of logits that a prefill step computes at most: feed_all() and score() want many rows, and a
// vocabulary is wide.
constexpr int64_t kMaxLogitBytes = 64 << 20;

SessionOptions complete(const LlamaModel& m, const Backend& b, SessionOptions o) {
  if (o.ctx == 0) o.ctx = std::min<int64_t>(4096, m.config.context);
  if (o.ctx < 1 || o.ctx > m.config.context)
    throw Error(ErrorKind::kUsage, "context " + std::to_string(o.ctx) + ": the model allows 1.." +
                                       std::to_string(m.config.context));
  if (o.sequences < 1 || o.chunk < 0)
    throw Error(ErrorKind::kUsage, "sequences must be at least 1, chunk not negative");
  o.chunk = std::min(o.chunk ? o.chunk : b.prompt_step(), o.ctx);
  return o;
}

Counts decode_counts(const SessionOptions& o) {
  const int rows = o.together ? std::min(o.together, o.sequences) : o.sequences;
  return {rows, rows};
}
Counts prefill_counts(const LlamaModel& m, const SessionOptions& o) {
  const int64_t most = kMaxLogitBytes / (4 * m.config.vocab);
  return {o.chunk, std::clamp<int64_t>(most < 64 ? most : most / 64 * 64, 1, o.chunk)};  // whole tiles
}

KvCache cache_of(const LlamaModel& m, const SessionOptions& o) {
  return {nullptr, o.kv, m.config.layers, o.sequences, o.ctx, m.config.kv_dim(), o.stride};
}

// Scratch lies behind the arena.
size_t aligned_arena(const MemoryPlan& p) { return size_t(round_up(int64_t(p.arena), int64_t(kArenaAlign))); }

Error not_finite(const TokenAt& t) {
  return Error(ErrorKind::kRuntime, "logits are not finite after position " + std::to_string(t.position) +
                                        " of sequence " + std::to_string(t.sequence));
}

// Throws Error(kResource) with the plan where the backend knows that it has less.
void require_memory(LlamaModel& m, const Backend& b, const MemoryPlan& p) {
  const std::optional<size_t> free = b.free_bytes();
  size_t there = 0;  // loaded by an earlier session
  for (const Weight* w : all_weights(m.weights))
    if (w->device) there += b.weight_bytes(*w);
  if (!free || p.total() - there <= *free) return;
  const auto mib = [](size_t bytes) { return std::to_string(bytes >> 20) + " MiB"; };
  throw Error(ErrorKind::kResource, "out of memory on " + b.describe() + ": weights " +
                                        mib(p.weights - there) + ", KV cache " + mib(p.kv) +
                                        ", activations " + mib(p.arena) + ", scratch " + mib(p.scratch) +
                                        ", in all " + mib(p.total() - there) + "; free: " + mib(*free) +
                                        ". A shorter context, fewer sequences or a smaller chunk need less");
}

}  // namespace

KvType default_kv(const LlamaModel& m, const Backend& b) {
  return b.name() == "cpu" && !m.packed() ? KvType::kF32 : KvType::kF16;
}

MemoryPlan Session::plan(LlamaModel& m, Backend& b, SessionOptions o) {
  o = complete(m, b, o);
  MemoryPlan p;
  for (const Weight* w : all_weights(m.weights)) p.weights += b.weight_bytes(*w);
  p.kv = cache_of(m, o).bytes();
  for (const Counts c : {decode_counts(o), prefill_counts(m, o)}) {
    Plan g(m, b, c);
    p.arena = std::max(p.arena, g.arena);
    p.scratch = std::max(p.scratch, b.scratch_bytes(g.graph));
  }
  return p;
}

Session::Session(LlamaModel& model, Backend& backend, SessionOptions options)
    : model_(model),
      backend_(backend),
      options_(complete(model, backend, options)),
      kv_(cache_of(model, options_)),
      lengths_(size_t(options_.sequences)) {
  fill_rope(model, options_.ctx);
  memory_ = plan(model, backend, options_);
  require_memory(model, backend, memory_);
  backend.load(all_weights(model.weights), options_.progress);
  decode_ = std::make_unique<Plan>(model, backend, decode_counts(options_));
  prefill_ = std::make_unique<Plan>(model, backend, prefill_counts(model, options_));
  kv_.base = backend_.allocate(memory_.kv, "the KV cache");
  arena_ = backend_.allocate(aligned_arena(memory_) + memory_.scratch, "activations");
  scratch_ = arena_ + aligned_arena(memory_);
  for (Plan* p : {decode_.get(), prefill_.get()}) p->graph.bind(arena_);
  logits_.resize(size_t(std::max(decode_counts(options_).outputs, prefill_counts(model_, options_).outputs)) *
                 size_t(model.config.vocab));
}

Session::~Session() {
  for (std::byte* p : {kv_.base, arena_})
    if (p) backend_.release(p);
}

void Session::truncate(int sequence, int64_t length) {
  lengths_.at(size_t(sequence)) = std::min(lengths_.at(size_t(sequence)), std::max<int64_t>(length, 0));
}

void Session::run(Plan& p, std::span<const TokenAt> batch, std::span<const int32_t> wanted, bool apart) {
  p.token.clear(), p.sequence.clear(), p.position.clear();
  for (const TokenAt& t : batch) {
    if (t.token < 0 || t.token >= model_.config.vocab)
      throw Error(ErrorKind::kUsage, "token " + std::to_string(t.token) +
                                         " is outside the model's vocabulary of " +
                                         std::to_string(model_.config.vocab));
    p.token.push_back(t.token), p.sequence.push_back(t.sequence), p.position.push_back(t.position);
  }
  p.wanted.assign(wanted.begin(), wanted.end());
  const auto put = [&](Tensor* t, const std::vector<int32_t>& v) {
    if (!v.empty()) backend_.write(t->data, v.data(), 4 * v.size());
  };
  put(p.in.token, p.token), put(p.in.sequence, p.sequence), put(p.in.position, p.position),
      put(p.in.wanted, p.wanted);
  const int64_t reach =
      1 + std::max_element(batch.begin(), batch.end(), [](const TokenAt& a, const TokenAt& b) {
            return a.position < b.position;
          })->position;
  backend_.run(p.graph, {int64_t(batch.size()), int64_t(wanted.size()), reach, apart}, kv_, scratch_);
}

std::span<const float> Session::read_logits(const Plan& p, std::span<const TokenAt> batch,
                                            std::span<const int32_t> wanted) {
  const size_t vocab = size_t(model_.config.vocab), n = wanted.size() * vocab;
  backend_.read(logits_.data(), p.logits->data, n * sizeof(float));
  for (size_t i = 0; i < wanted.size(); ++i) {
    int infinite = 0;  // or NaN; a sum of integers, so that the compiler may vectorise
    for (size_t j = 0; j < vocab; ++j)
      infinite += !(std::abs(logits_[i * vocab + j]) <= std::numeric_limits<float>::max());
    if (infinite > 0) throw not_finite(batch[size_t(wanted[i])]);
  }
  return {logits_.data(), n};
}

void Session::feed_steps(std::span<const int32_t> tokens, int sequence, int64_t first,
                         const std::function<void(const Fed&)>& done) {
  int64_t& length = lengths_.at(size_t(sequence));
  const int64_t n = int64_t(tokens.size());
  if (length + n > options_.ctx)
    throw Error(ErrorKind::kUsage, std::to_string(n) + " tokens after " + std::to_string(length) +
                                       " do not fit the context of " + std::to_string(options_.ctx));
  const int64_t most = prefill_counts(model_, options_).outputs;
  std::vector<TokenAt> batch;
  std::vector<int32_t> wanted;
  for (int64_t at = 0; at < n;) {
    batch.clear(), wanted.clear();
    const int64_t from = at;
    for (; at < n && int64_t(batch.size()) < options_.chunk && int64_t(wanted.size()) < most; ++at) {
      if (at >= first) wanted.push_back(int32_t(batch.size()));
      batch.push_back({tokens[size_t(at)], sequence, int32_t(length + at - from)});
    }
    // One token goes through the decode graph, which is built for few.
    Plan& p = int64_t(batch.size()) <= decode_->graph.max().tokens ? *decode_ : *prefill_;
    run(p, batch, wanted);
    done({p, batch, wanted, from});
    length += int64_t(batch.size());
  }
}

void Session::feed_all(std::span<const int32_t> tokens, int sequence, int64_t first,
                       const std::function<void(int64_t, std::span<const float>)>& visit) {
  const size_t vocab = size_t(model_.config.vocab);
  feed_steps(tokens, sequence, first, [&](const Fed& f) {
    const std::span<const float> logits = read_logits(f.plan, f.batch, f.wanted);
    for (size_t i = 0; i < f.wanted.size(); ++i)
      visit(f.from + f.wanted[i], logits.subspan(i * vocab, vocab));
  });
}

void Session::score(std::span<const int32_t> tokens, int sequence, std::span<const int32_t> targets,
                    std::span<LogitScore> scores, Session* reference) {
  assert(targets.size() <= tokens.size() && scores.size() == targets.size() && reference != this);
  const int64_t first = int64_t(tokens.size() - targets.size()), vocab = model_.config.vocab;
  int64_t given = 0;  // tokens that the reference was fed
  feed_steps(tokens, sequence, first, [&](const Fed& f) {
    if (f.wanted.empty()) return;
    const int64_t begin = f.from + f.wanted.front(), end = begin + int64_t(f.wanted.size());
    // Rows that `step` gave, of this session or of the reference: those after tokens[at] and later.
    const auto score_rows = [&](const Fed& step, int64_t at, const float* beside) {
      const int64_t n = int64_t(step.wanted.size());
      const int32_t* target = targets.data() + (at - first);
      LogitScore* score = scores.data() + (at - first);
      backend_.score({f.plan.logits->f32() + (at - begin) * vocab, beside, target, score, n, vocab});
      for (int64_t i = 0; i < n; ++i)
        if (!std::isfinite(score[i].nll)) throw not_finite(step.batch[size_t(step.wanted[size_t(i)])]);
    };
    if (!reference) return score_rows(f, begin, nullptr);
    // The reference may be cut into other steps: each is scored beside its part of the rows that are there.
    const int64_t before = given;
    reference->feed_steps(tokens.subspan(size_t(before), size_t(end - before)), sequence, begin - before,
                          [&](const Fed& r) {
                            if (!r.wanted.empty())
                              score_rows(r, before + r.from + r.wanted.front(), r.plan.logits->f32());
                          });
    given = end;
  });
}

std::span<const float> Session::feed(std::span<const int32_t> tokens, int sequence) {
  std::span<const float> last;
  feed_all(tokens, sequence, int64_t(tokens.size()) - 1,
           [&](int64_t, std::span<const float> l) { last = l; });
  return last;
}

std::span<const float> Session::step(std::span<const std::pair<int, int32_t>> items) {
  std::vector<TokenAt> batch;
  std::vector<int32_t> wanted(items.size());
  std::iota(wanted.begin(), wanted.end(), 0);
  for (const auto& [sequence, token] : items) {
    int64_t& length = lengths_.at(size_t(sequence));
    if (length >= options_.ctx)
      throw Error(ErrorKind::kUsage, "sequence " + std::to_string(sequence) +
                                         " is at the end of its context of " + std::to_string(options_.ctx));
    batch.push_back({token, sequence, int32_t(length)});
  }
  run(*decode_, batch, wanted, true);
  const std::span<const float> logits = read_logits(*decode_, batch, wanted);
  for (const auto& item : items) ++lengths_[size_t(item.first)];
  return logits;
}

void Session::decode(std::span<const Next> rows, int64_t steps, const OnStep& visit) {
  const SamplerOptions& o = rows.front().sampler->options();
  const int64_t window = o.repeat_last_n < 0 ? ctx() : o.repeat_last_n, vocab = model_.config.vocab;
  for (const Next& r : rows)
    if (length(r.sequence) + steps > ctx())
      throw Error(ErrorKind::kUsage, std::to_string(steps) + " steps after " +
                                         std::to_string(length(r.sequence)) +
                                         " tokens do not fit the context of " + std::to_string(ctx()));
  DecodeLoop loop{.graph = &decode_->graph,
                  .token = decode_->in.token,
                  .position = decode_->in.position,
                  .logits = decode_->logits,
                  .rows = {},
                  .steps = steps,
                  .params = {o.temperature, o.top_k, o.top_p, o.min_p, o.repeat_penalty, o.presence_penalty,
                             o.frequency_penalty, int32_t(window), o.seed},
                  .banned = o.banned};
  if (!loop.params.penalises()) loop.params.repeat_last_n = 0;
  std::vector<int32_t> next, at, sequence, wanted;
  for (const Next& r : rows) next.push_back(r.token);

  if (!backend_.decodes(loop.params, int64_t(o.banned.size()))) {
    std::vector<std::pair<int, int32_t>> items(rows.size());
    std::vector<int32_t> drawn(rows.size());
    for (int64_t i = 0; i < steps; ++i) {
      for (size_t r = 0; r < rows.size(); ++r) items[r] = {rows[r].sequence, next[r]};
      const std::span<const float> logits = step(items);
      for (size_t r = 0; r < rows.size(); ++r) {
        next[r] = drawn[r] = rows[r].sampler->sample(logits.subspan(r * size_t(vocab), size_t(vocab)));
        rows[r].sampler->accept(drawn[r]);
      }
      if (!visit(i, drawn)) return;
    }
    return;
  }

  for (size_t i = 0; i < rows.size(); ++i) {
    const Sampler& s = *rows[i].sampler;
    const std::span<const int32_t> history = s.history();
    const auto last = history.last(std::min(history.size(), size_t(loop.params.repeat_last_n)));
    sequence.push_back(rows[i].sequence);
    at.push_back(int32_t(length(rows[i].sequence)));
    wanted.push_back(int32_t(i));
    loop.rows.push_back({at.back(), s.sequence(), s.step(), {last.begin(), last.end()}});
  }
  const auto put = [&](Tensor* t, const std::vector<int32_t>& v) {
    if (!v.empty()) backend_.write(t->data, v.data(), 4 * v.size());
  };
  put(decode_->in.token, next), put(decode_->in.position, at);
  put(decode_->in.sequence, sequence), put(decode_->in.wanted, wanted);
  backend_.decode(loop, kv_, scratch_, [&](int64_t i, std::span<const int32_t> drawn) {
    for (size_t r = 0; r < rows.size(); ++r) {
      ++lengths_[size_t(rows[r].sequence)];
      rows[r].sampler->drew(drawn[r]);
    }
    return visit(i, drawn);
  });
}

}  // namespace q4s
