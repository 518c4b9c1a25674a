// Whole models on the GPU: against the same weights in f32 on the CPU, against themselves cut into other
// steps, and twenty times over. Without a GPU every case prints SKIPPED.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "doctest/doctest.h"
#include "kernels/compare_logits.h"
#include "kernels/linear.h"
#include "models/perplexity.h"
#include "models/session.h"
#include "runtime/error.h"
#include "tests/quick.h"

using namespace q4s;

namespace {

Backend* cuda() {
  static const std::unique_ptr<Backend> backend = []() -> std::unique_ptr<Backend> {
    try {
      return make_cuda_backend(0);
    } catch (const Error& e) {
      std::printf("SKIPPED: %s\n", e.what());
      return nullptr;
    }
  }();
  if (!backend) MESSAGE("SKIPPED: no GPU");
  return backend.get();
}

Backend& cpu() {
  static const std::unique_ptr<Backend> backend = make_cpu_backend(0);
  return *backend;
}

std::string data_folder() {
  if (const char* d = std::getenv("Q4S_DATA")) return d;
  for (const char* d : {"/../shared/data", "/../../shared/data"})
    if (std::filesystem::exists(std::string(Q4S_SOURCE_DIR) + d)) return std::string(Q4S_SOURCE_DIR) + d;
  return "";
}

// Every matrix as f32 on the host: what the CPU computes with then is exact up to f32 sums.
void expand(LlamaModel& m) {
  std::vector<Weight*> all = {&m.weights.embed, &m.weights.head};
  for (LlamaBlock& b : m.weights.blocks)
    for (Weight* w : {&b.qkv, &b.o, &b.gate_up, &b.down}) all.push_back(w);
  for (Weight* w : all) {
    if (w->view.n == 0) continue;
    cpu().load(*w);
    std::vector<float> v(size_t(w->view.n * w->view.k));
    dequantize_rows(w->view, 0, w->view.n, v.data());
    *w = make_weight_f32(w->name, w->view.n, w->view.k, std::move(v));
  }
}

std::vector<int32_t> some_tokens(int64_t n, int64_t vocab) {
  std::vector<int32_t> t(static_cast<size_t>(n));
  for (size_t i = 0; i < t.size(); ++i) t[i] = int32_t((i * i * 31 + i * 7 + 5) % size_t(vocab));
  return t;
}

using LogitRows = std::vector<std::vector<float>>;

LogitRows all_logits(Session& s, std::span<const int32_t> tokens, int sequence = 0) {
  LogitRows out;
  s.feed_all(tokens, sequence, 0,
             [&](int64_t, std::span<const float> l) { out.emplace_back(l.begin(), l.end()); });
  return out;
}

double nmse(const LogitRows& got, const LogitRows& want) {
  double error = 0, size = 0;
  for (size_t i = 0; i < want.size(); ++i)
    for (size_t j = 0; j < want[i].size(); ++j) {
      error += (double(got[i][j]) - want[i][j]) * (double(got[i][j]) - want[i][j]);
      size += double(want[i][j]) * want[i][j];
    }
  return error / size;
}

struct Shape {
  const char* name;
  LlamaConfig config;
  int64_t group;
  Format head;
  bool f16 = false;
};
LlamaConfig config(int64_t dim, int64_t hidden, int64_t layers, int64_t heads, int64_t kv_heads,
                   int64_t head_dim, int64_t vocab, bool tied) {
  LlamaConfig c;
  c.dim = dim, c.hidden = hidden, c.layers = layers, c.heads = heads, c.kv_heads = kv_heads,
  c.head_dim = head_dim;
  c.vocab = vocab, c.context = 640, c.tied = tied;
  return c;
}
std::vector<Shape> shapes() {
  std::vector<Shape> all = {
      {"smollm", config(576, 1536, 4, 9, 3, 64, 1021, true), 128, Format::kQ8},
      {"stories", config(64, 172, 5, 8, 4, 8, 512, true), 32, Format::kQ4},
      {"llama", config(512, 1376, 3, 4, 4, 128, 999, false), 128, Format::kQ8},
      {"wide groups", config(320, 700, 2, 8, 2, 48, 300, false), 1 << 20, Format::kF16},
      {"dense", config(192, 344, 2, 6, 2, 32, 300, false), 0, Format::kF16, true},
  };
  if (quick() > 0) all.resize(2);
  return all;
}
LlamaModel make(const Shape& s) {
  return random_llama(s.config, 11, s.f16 ? Format::kF16 : Format::kQ4, s.group, s.head);
}

// Greedy by the device; the text without the first token.
std::vector<int32_t> greedy(Session& s, int32_t first, int64_t steps, int sequence = 0) {
  SamplerOptions o;
  o.temperature = 0;
  Sampler sampler(o);
  std::vector<int32_t> text;
  const Session::Next next{sequence, first, &sampler};
  s.decode({&next, 1}, steps, [&](int64_t, std::span<const int32_t> t) {
    text.push_back(t[0]);
    return true;
  });
  return text;
}

}  // namespace

TEST_CASE("cuda: models against exact weights on the CPU, for steps of every size") {
  if (!cuda()) return;
  for (const Shape& shape : shapes()) {
    CAPTURE(shape.name);
    LlamaModel m = make(shape), exact = make(shape);
    expand(exact);
    Session reference(exact, cpu(), {.ctx = 320, .chunk = 64, .kv = KvType::kF32});
    const auto tokens = some_tokens(quick() > 1 ? 20 : 300, shape.config.vocab);
    const LogitRows want = all_logits(reference, tokens);
    LogitRows first;
    for (const int64_t chunk : {1, 5, 16, 40, 300}) {
      CAPTURE(chunk);
      Session s(m, *cuda(), {.ctx = 320, .chunk = chunk});
      LogitRows got;
      for (size_t at = 0; at < tokens.size(); at += size_t(chunk)) {
        const size_t count = std::min(tokens.size() - at, size_t(chunk));
        const LogitRows part = all_logits(s, std::span(tokens).subspan(at, count));
        got.insert(got.end(), part.begin(), part.end());
      }
      REQUIRE(got.size() == want.size());
      // Every activation is rounded to fp16 once per product: 2^-12 rms each, some tens of them in a row.
      const double error = nmse(got, want);
      std::printf("%s, %d tokens a step: nmse %.2e\n", shape.name, int(chunk), error);
      CHECK(error < 1e-4);
      if (first.empty()) first = got;
      CHECK(nmse(got, first) < 1e-4);
    }
  }
}

TEST_CASE("cuda: perplexity and divergence are those of the same logits on the host") {
  if (!cuda()) return;
  const int64_t ctx = quick() > 1 ? 40 : 300;
  for (const Shape& shape : shapes())
    for (const PplProtocol protocol : {PplProtocol::kGptq, PplProtocol::kLlamaCpp}) {
      CAPTURE(shape.name);
      LlamaModel m = make(shape), other = make(shape);
      other.weights.final_norm =
          make_weight_f32("final_norm", 1, m.config.dim, std::vector<float>(size_t(m.config.dim), 1.1f));
      const PplText text{.protocol = protocol,
                         .ctx = ctx + 1,
                         .chunks = 2,
                         .tokens = some_tokens(2 * (ctx + 1), shape.config.vocab),
                         .bos = "none",
                         .hash = 0};
      Session s(m, *cuda(), {.ctx = ctx, .chunk = ctx}),
          reference(other, *cuda(), {.ctx = ctx, .chunk = ctx});
      double nll = 0, ref_nll = 0, kl = 0, same = 0;
      for (int64_t w = 0; w < text.chunks; ++w) {
        const auto window = std::span(text.tokens).subspan(size_t(w * text.ctx), size_t(text.ctx));
        s.truncate(0, 0), reference.truncate(0, 0);
        const LogitRows q = all_logits(s, window.first(size_t(ctx))),
                        p = all_logits(reference, window.first(size_t(ctx)));
        for (size_t i = size_t(text.first_scored()); i < size_t(ctx); ++i) {
          const LogitComparison c = compare_logits(p[i].data(), q[i].data(), shape.config.vocab);
          nll += c.lse_q - q[i][size_t(window[i + 1])];
          ref_nll += c.lse_p - p[i][size_t(window[i + 1])];
          kl += c.kl;
          same += c.top_p == c.top_q;
        }
      }
      const PplResult alone = perplexity(text, s, nullptr, nullptr),
                      both = perplexity(text, s, &reference, nullptr);
      const double n = double(alone.scored);
      CHECK(alone.scored == 2 * text.scored_per_window());
      CHECK(alone.ppl == doctest::Approx(std::exp(nll / n)).epsilon(1e-5));
      CHECK(both.ppl == alone.ppl);
      CHECK(both.ref_ppl == doctest::Approx(std::exp(ref_nll / n)).epsilon(1e-5));
      // Fewer rows of logits at a time may be other sums of the head: the last bits of f32.
      CHECK(both.kl_mean == doctest::Approx(kl / n).epsilon(1e-3));
      CHECK(both.top1 == doctest::Approx(same / n).epsilon(0.01));
    }
}

TEST_CASE("cuda: decoding on the device is stepping with the host's sampler") {
  if (!cuda()) return;
  for (const Shape& shape : shapes()) {
    CAPTURE(shape.name);
    LlamaModel m = make(shape);
    for (const float temperature : {0.f, 0.9f})
      for (const int top_k : {0, 1, 40, 300})
        for (const float penalty : {1.f, 1.3f}) {
          if (quick() > 1 && (temperature == 0 || top_k != 40 || penalty == 1)) continue;
          CAPTURE(temperature);
          CAPTURE(top_k);
          CAPTURE(penalty);
          SamplerOptions o;
          o.temperature = temperature, o.top_k = top_k, o.seed = 7, o.repeat_penalty = penalty;
          o.top_p = top_k ? 0.9f : 1.f;
          o.min_p = 0.02f;
          o.presence_penalty = penalty - 1, o.repeat_last_n = 20, o.banned = {3, 5};
          Session s(m, *cuda(), {.ctx = 160, .sequences = 2});
          std::vector<Sampler> host(2, Sampler(o)), device(2, Sampler(o));
          host[1] = Sampler(o, 5), device[1] = Sampler(o, 5);
          const auto prompt = some_tokens(30, shape.config.vocab);
          std::vector<std::vector<int32_t>> want, got;
          std::vector<std::pair<int, int32_t>> items = {{0, prompt[0]}, {1, prompt[1]}};
          const auto begin = [&](std::vector<Sampler>& samplers) {
            for (int i = 0; i < 2; ++i) {
              s.truncate(i, 0);
              s.feed(std::span(prompt).first(size_t(10 + i)), i);
              for (const int32_t t : prompt) samplers[size_t(i)].accept(t);
            }
          };
          begin(host);
          for (int step = 0; step < 60; ++step) {
            const auto logits = s.step(items);
            want.emplace_back();
            for (size_t i = 0; i < 2; ++i) {
              items[i].second =
                  host[i].sample(logits.subspan(i * size_t(shape.config.vocab), size_t(shape.config.vocab)));
              host[i].accept(items[i].second);
              want.back().push_back(items[i].second);
            }
          }
          begin(device);
          const std::vector<Session::Next> next = {{0, prompt[0], &device[0]}, {1, prompt[1], &device[1]}};
          s.decode(next, 25, [&](int64_t, std::span<const int32_t> t) {
            got.emplace_back(t.begin(), t.end());
            return true;
          });
          const std::vector<Session::Next> more = {{0, got.back()[0], &device[0]},
                                                   {1, got.back()[1], &device[1]}};
          s.decode(more, 100, [&](int64_t i, std::span<const int32_t> t) {
            got.emplace_back(t.begin(), t.end());
            return i < 34;
          });
          CHECK(s.length(0) == 70);
          CHECK(s.length(1) == 71);
          // The same logits, and the same sums but for the last bit of exp(): a draw may differ once in
          // millions.
          CHECK(got == want);
        }
  }
}

TEST_CASE("cuda: twenty runs give the same bits; other sequences do not change one") {
  if (!cuda()) return;
  for (const Shape& shape : shapes()) {
    CAPTURE(shape.name);
    LlamaModel m = make(shape);
    Session s(m, *cuda(), {.ctx = 320, .sequences = 3, .chunk = 100});
    const auto tokens = some_tokens(130, shape.config.vocab);
    LogitRows first;
    std::vector<int32_t> text;
    for (int run = 0; run < (quick() > 1 ? 2 : 20); ++run) {
      s.truncate(0, 0);
      const LogitRows rows = all_logits(s, tokens);
      const auto t = greedy(s, 1, quick() > 1 ? 10 : 100);
      if (run == 0) first = rows, text = t;
      CHECK(rows == first);
      CHECK(t == text);
    }
    // Three sequences at a time: the sums of a row do not depend on its neighbours.
    for (int i = 0; i < 3; ++i) {
      s.truncate(i, 0);
      s.feed(std::span(tokens).first(size_t(20 + 30 * i)), i);
    }
    LogitRows batch;
    std::vector<int32_t> drawn[3];
    std::vector<std::pair<int, int32_t>> items = {{0, 7}, {1, 8}, {2, 9}};
    const auto logits = s.step(items);
    for (int i = 0; i < 3; ++i) {
      const auto row = logits.subspan(size_t(i) * size_t(shape.config.vocab), size_t(shape.config.vocab));
      batch.emplace_back(row.begin(), row.end());
    }
    LogitRows single;
    for (int i = 0; i < 3; ++i) {
      s.truncate(i, 20 + 30 * i);
      const int32_t t = 7 + i;
      const auto row = s.feed({&t, 1}, i);
      single.emplace_back(row.begin(), row.end());
    }
    CHECK(nmse(batch, single) < 1e-5);
  }
}

TEST_CASE("cuda: logits that are not finite stop a run and name the position") {
  if (!cuda()) return;
  LlamaModel m = make(shapes()[0]);
  std::vector<float> gain(size_t(m.config.dim), 1.f);
  gain[5] = NAN;
  m.weights.final_norm = make_weight_f32("final_norm", 1, m.config.dim, gain);
  Session s(m, *cuda(), {.ctx = 64});
  const auto message = [](const auto& fn) -> std::string {
    try {
      fn();
    } catch (const Error& e) {
      return e.kind() == ErrorKind::kRuntime ? e.what() : "";
    }
    return "";
  };
  const std::vector<int32_t> tokens = {1, 2, 3};
  CHECK(message([&] { s.feed(tokens); }).find("position 2") != std::string::npos);
  CHECK(s.length(0) == 0);  // nothing of what failed is kept
  LogitScore score[2];
  CHECK(message([&] { s.score(tokens, 0, std::span(tokens).last(2), score); }).find("position 1") !=
        std::string::npos);
  CHECK(s.length(0) == 0);
  CHECK(message([&] { greedy(s, 4, 10); }).find("position 0") != std::string::npos);
}

TEST_CASE("cuda: stories260K writes the golden text") {
  if (!cuda()) return;
  const std::string folder = data_folder();
  if (folder.empty() || quick() > 1) {
    MESSAGE("SKIPPED: no data folder, or not for a sanitizer");
    return;
  }
  LlamaModel m = open_llama(folder + "/stories260K");
  std::ifstream file(folder + "/stories260K/golden_greedy.json");
  for (const auto& c : nlohmann::json::parse(file)["cases"]) {
    const auto prompt = c["prompt_ids"].get<std::vector<int32_t>>(),
               want = c["greedy_ids"].get<std::vector<int32_t>>();
    const auto margins = c["margins"].get<std::vector<double>>();
    for (const KvType kv : {KvType::kF32, KvType::kF16}) {
      Session s(m, *cuda(), {.ctx = 512, .kv = kv});
      if (prompt.size() > 1) s.feed(std::span(prompt).first(prompt.size() - 1));
      const auto got = greedy(s, prompt.back(), int64_t(want.size()));
      size_t same = 0;
      while (same < want.size() && got[same] == want[same]) ++same;
      std::printf("stories260K: %zu of %zu golden tokens\n", same, want.size());
      // Equal, or parted where two tokens are as good as equal.
      if (same < want.size()) CHECK(margins[same] < (kv == KvType::kF32 ? 1e-3 : 2e-2));
    }
  }
}

TEST_CASE("cuda: SmolLM2 against the CPU") {
  if (!cuda()) return;
  const char* path = std::getenv("Q4S_SMOLLM2");  // a .q4s or GGUF file
  if (!path) {
    MESSAGE("SKIPPED: Q4S_SMOLLM2 names no file");
    return;
  }
  LlamaModel m = open_llama(path), exact = open_llama(path);
  expand(exact);
  Session reference(exact, cpu(), {.ctx = 256, .chunk = 128, .kv = KvType::kF32}),
      s(m, *cuda(), {.ctx = 256});
  auto text = some_tokens(40, 40000);
  s.feed(std::span(text).first(39));
  const auto drawn = greedy(s, text.back(), 200);
  text.insert(text.end(), drawn.begin(), drawn.end() - 1);
  const LogitRows want = all_logits(reference, text);
  // Where the exact model would have chosen otherwise, its two best must be as good as equal.
  for (size_t i = 0; i < drawn.size(); ++i) {
    const auto& row = want[39 + i];
    const float best = *std::max_element(row.begin(), row.end());
    CHECK(best - row[size_t(drawn[i])] < 0.1f);
  }
}
