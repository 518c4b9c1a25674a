#include "models/perplexity.h"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstring>

#include "kernels/compare_logits.h"
#include "runtime/checksum.h"
#include "runtime/error.h"
#include "runtime/log.h"
#include "runtime/tokenizer.h"

namespace q4s {
namespace {

// Positions held at a time: enough to keep all threads busy, little beside a model.
constexpr int64_t kRowsHeld = 256;

// What one scored position gives.
struct Score {
  double nll = 0, ref_nll = 0, kl = 0;
  bool same_top = false;
};

Score compare(std::span<const float> q, std::span<const float> p, int32_t target) {
  const LogitComparison c = compare_logits(p.data(), q.data(), int64_t(p.size()));
  return {c.lse_q - q[size_t(target)], c.lse_p - p[size_t(target)], c.kl, c.top_p == c.top_q};
}

struct Moments {
  double sum = 0, squares = 0;
  int64_t n = 0;
  void add(double x) { sum += x, squares += x * x, ++n; }
  double mean() const { return sum / double(n); }
  double standard_error() const {  // of the mean
    if (n < 2) return 0;
    return std::sqrt(std::max(0.0, squares / double(n) - mean() * mean()) / double(n - 1));
  }
};

// HeldRows of logits of the next few positions of a session.
class HeldRows {
 public:
  explicit HeldRows(Session& session) : session_(session) {}

  // Feeds tokens; keeps the logits after tokens[first] and later.
  void feed(std::span<const int32_t> tokens, int64_t first) {
    const int64_t count = int64_t(tokens.size()) - first;
    session_.feed_all(tokens, 0, first, [&](int64_t i, std::span<const float> logits) {
      if (i == first) {
        vocab_ = logits.size();
        values_.resize(vocab_ * size_t(count));
      }
      std::memcpy(values_.data() + size_t(i - first) * vocab_, logits.data(), vocab_ * sizeof(float));
    });
  }
  std::span<const float> row(int64_t i) const { return {values_.data() + size_t(i) * vocab_, vocab_}; }

 private:
  Session& session_;
  size_t vocab_ = 0;
  std::vector<float> values_;  // (kRowsHeld, V)
};

}  // namespace

double negative_log_likelihood(std::span<const float> logits, int32_t target) {
  return compare_logits(logits.data(), logits.data(), int64_t(logits.size())).lse_p - logits[size_t(target)];
}

PplText cut_text(std::string_view text, const Tokenizer& tokenizer, int64_t model_context,
                 const PplOptions& options) {
  const bool gptq = options.protocol == PplProtocol::kGptq;
  PplText cut{};
  cut.protocol = options.protocol;
  cut.ctx = options.ctx ? options.ctx : std::min<int64_t>(gptq ? 2048 : 512, model_context);
  if (cut.ctx > model_context)
    throw Error(ErrorKind::kUsage, strprintf("windows of %lld tokens: the model's context is %lld",
                                             (long long)cut.ctx, (long long)model_context));
  if (cut.scored_per_window() < 1)
    throw Error(ErrorKind::kUsage,
                strprintf("windows of %lld tokens leave nothing to score", (long long)cut.ctx));
  cut.tokens = tokenizer.encode_prompt(text, false);
  const int64_t whole = int64_t(cut.tokens.size()) / cut.ctx;
  if (whole < 1)
    throw Error(ErrorKind::kInput, strprintf("too little text: %zu tokens, one window takes %lld",
                                             cut.tokens.size(), (long long)cut.ctx));
  cut.chunks = options.chunks ? std::min(options.chunks, whole) : whole;
  if (tokenizer.add_bos() && !gptq) cut.window_bos = tokenizer.bos_id();
  cut.bos = !tokenizer.add_bos() ? "none" : gptq ? "text" : "window";
  cut.hash = xxh3(text.data(), text.size());
  return cut;
}

PplResult perplexity(const PplText& text, Session& session, Session* reference, ThreadPool& pool,
                     const std::function<void(int64_t, double)>& on_window) {
  assert(session.ctx() >= text.ctx - 1 && (!reference || reference->ctx() >= text.ctx - 1));
  HeldRows rows(session);
  std::unique_ptr<HeldRows> ref_rows = reference ? std::make_unique<HeldRows>(*reference) : nullptr;
  Moments nll, ref_nll, kl;
  std::vector<float> kls;
  std::vector<Score> scores;
  int64_t same_top = 0;

  std::vector<int32_t> window;
  for (int64_t w = 0; w < text.chunks; ++w) {
    window.assign(text.tokens.begin() + w * text.ctx, text.tokens.begin() + (w + 1) * text.ctx);
    const std::vector<int32_t> targets = window;  // the replaced first token is nobody's target
    if (text.window_bos >= 0) window[0] = text.window_bos;
    session.truncate(0, 0);
    if (reference) reference->truncate(0, 0);

    // The last token predicts nothing that is scored: it is not fed.
    for (int64_t fed = 0, last = text.ctx - 1; fed < last;) {
      const int64_t first = std::max(fed, text.first_scored()), end = std::min(first + kRowsHeld, last);
      const std::span<const int32_t> slice(window.data() + fed, size_t(end - fed));
      rows.feed(slice, first - fed);
      if (reference) ref_rows->feed(slice, first - fed);
      scores.assign(size_t(end - first), {});
      pool.parallel_for(end - first, 1, [&](int64_t begin, int64_t stop) {
        for (int64_t i = begin; i < stop; ++i) {
          const int32_t target = targets[size_t(first + i + 1)];
          scores[size_t(i)] = reference ? compare(rows.row(i), ref_rows->row(i), target)
                                        : Score{.nll = negative_log_likelihood(rows.row(i), target)};
        }
      });
      for (const Score& s : scores) {
        nll.add(s.nll);
        if (!reference) continue;
        ref_nll.add(s.ref_nll);
        kl.add(s.kl);
        kls.push_back(float(s.kl));
        same_top += s.same_top;
      }
      fed = end;
    }
    if (on_window) on_window(w + 1, std::exp(nll.mean()));
  }

  PplResult result;
  result.ppl = std::exp(nll.mean());
  result.ppl_stderr = nll.standard_error() * result.ppl;
  result.chunks = text.chunks;
  result.scored = nll.n;
  if (reference) {
    std::sort(kls.begin(), kls.end());
    result.ref_ppl = std::exp(ref_nll.mean());
    result.kl_mean = kl.mean();
    result.kl_stderr = kl.standard_error();
    result.kl_p99 = kls[size_t(std::ceil(0.99 * double(kls.size()))) - 1];  // nearest rank
    result.kl_max = kls.back();
    result.top1 = double(same_top) / double(kl.n);
  }
  return result;
}

}  // namespace q4s
