// Perplexity of a model on a text, and its divergence from a reference model, by one of two named protocols.
//
//   gptq      windows of 2048 tokens that do not overlap; every target but the window's first token is scored
//             (evaluation of the GPTQ paper, Frantar et al. 2022)
//   llamacpp  windows of 512; the first token of each replaced by BOS where the model adds BOS; only
//   positions
//             n_ctx/2 .. n_ctx-2 predict a scored target (llama.cpp's tool)
//
// In both the whole text is tokenised once, with one leading BOS where the model adds BOS; special tokens
// spelled in the text are text. What is left over after the last whole window is not scored.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "models/session.h"

namespace q4s {

enum class PplProtocol { kGptq, kLlamaCpp };

struct PplOptions {
  PplProtocol protocol = PplProtocol::kGptq;
  int64_t ctx = 0;     // tokens of a window; 0: the protocol's, or the model's context if smaller
  int64_t chunks = 0;  // at most so many windows; 0: all
};

// A text cut into windows.
struct PplText {
  PplProtocol protocol;
  int64_t ctx, chunks;
  std::vector<int32_t> tokens;  // of the whole text
  int32_t window_bos = -1;      // replaces the first token of each window; -1: none
  std::string bos;              // policy in a word: "none", "text" (once, in front), "window"
  uint64_t hash;                // XXH3-64 of the text's bytes

  int64_t first_scored() const {
    return protocol == PplProtocol::kGptq ? 0 : ctx / 2;
  }  // position that predicts
  int64_t scored_per_window() const { return ctx - 1 - first_scored(); }
};

// Throws Error(kUsage) for a window beyond the model's context or too short to score, Error(kInput) with both
// counts where the text does not fill one window.
PplText cut_text(std::string_view text, const Tokenizer& tokenizer, int64_t model_context,
                 const PplOptions& options);

struct PplResult {
  double ppl = 0, ppl_stderr = 0;  // stderr: standard error of the mean negative log-likelihood, times ppl
  int64_t chunks = 0, scored = 0;
  // Against a reference, in nats per scored position: KL(reference || model).
  double ref_ppl = 0, kl_mean = 0, kl_stderr = 0, kl_p99 = 0, kl_max = 0;
  double top1 = 0;  // share of positions where both models prefer the same token
};

// Runs the windows through the session (and the reference, which may be null and must share the vocabulary);
// both need ctx() >= text.ctx - 1. Logits stay where they are computed: the backend scores them, a few
// hundred positions at a time, with the same result for every number of threads. on_window(windows done,
// perplexity so far).
PplResult perplexity(const PplText& text, Session& session, Session* reference,
                     const std::function<void(int64_t, double)>& on_window);

}  // namespace q4s
