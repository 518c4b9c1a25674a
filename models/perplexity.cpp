#include "models/perplexity.h"

#include <algorithm>
#include <cassert>
#include <cmath>

#include "runtime/checksum.h"
#include "runtime/error.h"
#include "runtime/log.h"
#include "runtime/tokenizer.h"

namespace q4s {
namespace {

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

}  // namespace

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

PplResult perplexity(const PplText& text, Session& session, Session* reference,
                     const std::function<void(int64_t, double)>& on_window) {
  assert(session.ctx() >= text.ctx - 1 && (!reference || reference->ctx() >= text.ctx - 1));
  Moments nll, ref_nll, kl;
  std::vector<float> kls;
  std::vector<LogitScore> scores(size_t(text.scored_per_window()));
  int64_t same_top = 0;

  std::vector<int32_t> window;
  for (int64_t w = 0; w < text.chunks; ++w) {
    window.assign(text.tokens.begin() + w * text.ctx, text.tokens.begin() + (w + 1) * text.ctx);
    if (text.window_bos >= 0) window[0] = text.window_bos;  // the replaced token is nobody's target
    session.truncate(0, 0);
    if (reference) reference->truncate(0, 0);
    // The last token predicts nothing that is scored: it is not fed.
    const std::span<const int32_t> all = window;
    session.score(all.first(all.size() - 1), 0, all.last(scores.size()), scores, reference);
    for (const LogitScore& s : scores) {
      nll.add(s.nll);
      if (!reference) continue;
      ref_nll.add(s.ref_nll);
      kl.add(s.kl);
      kls.push_back(float(s.kl));
      same_top += s.same_top;
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
