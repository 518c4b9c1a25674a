// The two protocols against their definitions computed the slow way, in double, one position at a time.
#include "models/perplexity.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>

#include "runtime/error.h"
#include "runtime/tokenizer.h"
#include "tests/runtime/tiny_vocab.h"

using namespace q4s;

namespace {

LlamaModel small_model(uint64_t seed, int64_t vocab, int64_t context = 48) {
  LlamaConfig c;
  c.dim = 40, c.hidden = 56, c.layers = 2, c.heads = 5, c.kv_heads = 5, c.head_dim = 8, c.context = context;
  c.vocab = vocab;
  return random_llama(c, seed, Format::kF32, 0, Format::kF32);
}

std::string some_text() {
  std::string text;
  for (int i = 0; i < 60; ++i)
    text += "hello " + std::to_string(i * i % 91) + (i % 7 ? " w\xC3\xA9" : "<s>\n");
  return text;
}

std::vector<double> log_softmax(std::span<const float> x) {
  const double top = *std::max_element(x.begin(), x.end());
  double sum = 0;
  for (float v : x) sum += std::exp(double(v) - top);
  std::vector<double> out;
  for (float v : x) out.push_back(v - top - std::log(sum));
  return out;
}

struct Slow {
  double ppl = 0, kl = 0, kl_max = 0, top1 = 0;
};

// Windows from `ids`, BOS put first where bos >= 0, positions [first, ctx-2] scored; two models.
Slow slow(std::vector<int32_t> ids, int64_t ctx, int64_t chunks, int32_t bos, int64_t first, Session& a,
          Session& b) {
  Slow s;
  int64_t n = 0;
  for (int64_t w = 0; w < chunks; ++w) {
    std::vector<int32_t> window(ids.begin() + w * ctx, ids.begin() + (w + 1) * ctx);
    if (bos >= 0) window[0] = bos;
    a.truncate(0, 0), b.truncate(0, 0);
    for (int64_t i = 0; i + 1 < ctx; ++i) {
      const auto p = log_softmax(b.feed(std::span(&window[size_t(i)], 1)));
      const auto q = log_softmax(a.feed(std::span(&window[size_t(i)], 1)));
      if (i < first) continue;
      s.ppl -= q[size_t(ids[size_t(w * ctx + i + 1)])];
      double kl = 0;
      for (size_t v = 0; v < p.size(); ++v) kl += std::exp(p[v]) * (p[v] - q[v]);
      s.kl += kl, s.kl_max = std::max(s.kl_max, kl);
      s.top1 += std::max_element(p.begin(), p.end()) - p.begin() ==
                std::max_element(q.begin(), q.end()) - q.begin();
      ++n;
    }
  }
  return {std::exp(s.ppl / double(n)), s.kl / double(n), s.kl_max, s.top1 / double(n)};
}

}  // namespace

TEST_CASE("both protocols give what their definitions say, with and without BOS, for every thread count") {
  GgufVocab vocab = test::tiny_bpe({"<s>", "</s>"});
  vocab.bos = 0, vocab.eos = 1;
  for (const bool bos : {false, true}) {
    vocab.add_bos = bos;
    const auto tokenizer = Tokenizer::from_gguf(vocab);
    const std::string text = some_text();
    std::vector<int32_t> ids = tokenizer->encode(text, false);
    CHECK(std::count(ids.begin(), ids.end(), 0) == 0);  // "<s>" in a text is text
    if (bos) ids.insert(ids.begin(), 0);
    for (const PplProtocol protocol : {PplProtocol::kGptq, PplProtocol::kLlamaCpp}) {
      const bool gptq = protocol == PplProtocol::kGptq;
      const PplText cut =
          cut_text(text, *tokenizer, 48, {.protocol = protocol, .ctx = gptq ? 0 : 15, .chunks = 3});
      CHECK(cut.tokens == ids);
      CHECK(cut.ctx == (gptq ? 48 : 15));  // the model's context, smaller than the protocol's
      CHECK(cut.chunks == 3);
      CHECK(cut.bos == (!bos ? "none" : gptq ? "text" : "window"));
      LlamaModel m = small_model(1, tokenizer->vocab_size()), ref = small_model(2, tokenizer->vocab_size());
      PplResult before;
      for (const int threads : {1, 2, 3}) {
        const auto backend = make_cpu_backend(threads);
        Session a(m, *backend, {.ctx = 47, .chunk = 9, .kv = KvType::kF32}),
            b(ref, *backend, {.kv = KvType::kF32});
        int64_t windows = 0;
        double last = 0;
        const PplResult r = perplexity(cut, a, &b, [&](int64_t w, double ppl) {
          CHECK(w == ++windows);
          last = ppl;
        });
        CHECK(windows == 3);
        CHECK(last == r.ppl);
        CHECK(r.scored == 3 * (gptq ? 47 : 7));
        if (threads == 1) {
          before = r;
          const Slow s = slow(ids, cut.ctx, 3, bos && !gptq ? 0 : -1, gptq ? 0 : 7, a, b);
          CHECK(r.ppl == doctest::Approx(s.ppl).epsilon(1e-5));
          CHECK(r.kl_mean == doctest::Approx(s.kl).epsilon(1e-4));
          CHECK(r.kl_max == doctest::Approx(s.kl_max).epsilon(1e-4));
          CHECK(r.kl_p99 <= r.kl_max);
          CHECK(r.top1 == s.top1);
          const PplResult alone = perplexity(cut, a, nullptr, nullptr);
          CHECK(alone.ppl == doctest::Approx(r.ppl).epsilon(1e-12));
          CHECK(alone.ppl_stderr == doctest::Approx(r.ppl_stderr).epsilon(1e-9));
          // The reference is fed in the steps of the model beside it.
          Session same_steps(ref, *backend, {.ctx = 47, .chunk = 9, .kv = KvType::kF32});
          const PplResult reference_alone = perplexity(cut, same_steps, nullptr, nullptr);
          CHECK(r.ref_ppl == doctest::Approx(reference_alone.ppl).epsilon(1e-12));
          CHECK(r.ref_ppl == doctest::Approx(perplexity(cut, b, nullptr, nullptr).ppl).epsilon(1e-5));
        }
        CHECK(r.ppl == before.ppl);
        CHECK(r.kl_mean == before.kl_mean);
        CHECK(r.kl_p99 == before.kl_p99);
      }
    }
  }
}

TEST_CASE("a model has no divergence from itself") {
  const auto tokenizer = Tokenizer::from_gguf(test::tiny_bpe({"<s>"}));
  LlamaModel m = small_model(3, tokenizer->vocab_size());
  const auto backend = make_cpu_backend(2);
  Session a(m, *backend, {.kv = KvType::kF32}), b(m, *backend, {.kv = KvType::kF32});
  const PplResult r = perplexity(cut_text(some_text(), *tokenizer, 48, {}), a, &b, nullptr);
  CHECK(r.kl_mean == 0);
  CHECK(r.kl_max == 0);
  CHECK(r.top1 == 1);
  CHECK(r.ref_ppl == r.ppl);
}

TEST_CASE("logits that are not finite stop the run and name the position") {
  const auto tokenizer = Tokenizer::from_gguf(test::tiny_bpe({"<s>"}));
  const auto backend = make_cpu_backend(2);
  const PplText cut = cut_text(some_text(), *tokenizer, 48, {.protocol = PplProtocol::kLlamaCpp, .ctx = 48});
  LlamaModel good = small_model(4, tokenizer->vocab_size()), bad = small_model(4, tokenizer->vocab_size());
  std::vector<float> gain(size_t(bad.config.dim), 1.f);
  gain[5] = NAN;
  bad.weights.final_norm = make_weight_f32("final_norm", 1, bad.config.dim, gain);
  Session a(good, *backend, {.kv = KvType::kF32}), b(bad, *backend, {.chunk = 7, .kv = KvType::kF32});
  const auto message = [&](Session& s, Session* reference) -> std::string {
    try {
      perplexity(cut, s, reference, nullptr);
    } catch (const Error& e) {
      return e.kind() == ErrorKind::kRuntime ? e.what() : "";
    }
    return "";
  };
  for (Session* reference : {static_cast<Session*>(nullptr), &a})
    CHECK(message(b, reference) == "logits are not finite after position 24 of sequence 0");
  CHECK(message(a, &b) == "logits are not finite after position 24 of sequence 0");
}

TEST_CASE("windows that cannot be are refused with the numbers") {
  const auto tokenizer = Tokenizer::from_gguf(test::tiny_bpe({"<s>"}));
  const auto refused = [&](std::string_view text, PplOptions options, ErrorKind kind,
                           const std::string& words) {
    try {
      cut_text(text, *tokenizer, 48, options);
      FAIL("accepted");
    } catch (const Error& e) {
      CHECK(e.kind() == kind);
      CHECK(std::string(e.what()).find(words) != std::string::npos);
    }
  };
  refused("abc", {}, ErrorKind::kInput, "3 tokens, one window takes 48");
  refused("", {}, ErrorKind::kInput, "0 tokens");
  refused(some_text(), {.ctx = 49}, ErrorKind::kUsage, "49 tokens: the model's context is 48");
  refused(some_text(), {.ctx = 1}, ErrorKind::kUsage, "nothing to score");
  refused(some_text(), {.protocol = PplProtocol::kLlamaCpp, .ctx = 2}, ErrorKind::kUsage, "nothing to score");
  CHECK(cut_text(some_text(), *tokenizer, 48, {.chunks = 1000}).chunks < 1000);
}
