// The engine's invariants on small random models: how a text is cut into steps, how many threads work, and
// which other sequences are about must not change the result.
#include "models/session.h"

#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <numeric>

#include "runtime/error.h"

using namespace q4s;

namespace {

LlamaConfig small_config() {
  LlamaConfig c;
  c.dim = 72, c.hidden = 172, c.layers = 3, c.heads = 6, c.kv_heads = 2, c.head_dim = 12, c.vocab = 97,
  c.context = 64;
  return c;
}

std::vector<int32_t> some_tokens(int n) {
  std::vector<int32_t> t(static_cast<size_t>(n));
  for (int i = 0; i < n; ++i) t[size_t(i)] = (i * 31 + 5) % 97;
  return t;
}

std::vector<std::vector<float>> all_logits(Session& s, std::span<const int32_t> tokens, int sequence = 0) {
  std::vector<std::vector<float>> out;
  s.feed_all(tokens, sequence, 0,
             [&](int64_t, std::span<const float> l) { out.emplace_back(l.begin(), l.end()); });
  return out;
}

// Largest difference relative to the largest magnitude of the reference.
double worst(const std::vector<float>& a, const std::vector<float>& b) {
  double diff = 0, size = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    diff = std::max(diff, std::abs(double(a[i]) - b[i]));
    size = std::max(size, std::abs(double(b[i])));
  }
  return diff / size;
}

}  // namespace

TEST_CASE("N decode steps give what a prefill of N gives") {
  for (const Format f : {Format::kF32, Format::kQ4}) {
    LlamaModel m = random_llama(small_config(), 1, f, 32, f == Format::kQ4 ? Format::kQ8 : f);
    auto backend = make_cpu_backend(2);
    Session whole(m, *backend, {.chunk = 64, .kv = KvType::kF32}),
        stepwise(m, *backend, {.chunk = 5, .kv = KvType::kF32});
    const auto tokens = some_tokens(40);
    const auto a = all_logits(whole, tokens);
    REQUIRE(a.size() == tokens.size());
    for (size_t i = 0; i < 20; ++i) {
      const auto l = stepwise.feed(std::span(&tokens[i], 1));
      CHECK(worst({l.begin(), l.end()}, a[i]) < 1e-5);  // sums in another order, three blocks deep
    }
    const auto rest = all_logits(stepwise, std::span(tokens).subspan(20));
    for (size_t i = 0; i < rest.size(); ++i) CHECK(worst(rest[i], a[20 + i]) < 1e-5);
  }
}

TEST_CASE("the same bits for every thread count, and again in a second run") {
  for (const Format f : {Format::kF32, Format::kQ4}) {
    std::vector<std::vector<float>> first;
    for (const int threads : {1, 2, 3, 7, 2}) {
      LlamaModel m = random_llama(small_config(), 2, f, 64, f == Format::kQ4 ? Format::kQ8 : f);
      auto backend = make_cpu_backend(threads);
      Session s(m, *backend, {});
      const auto tokens = some_tokens(33);
      auto l = all_logits(s, tokens);
      s.truncate(0, 0);
      CHECK(all_logits(s, tokens) == l);
      for (const int32_t t : {3, 1, 4}) {
        const auto step = s.feed(std::span(&t, 1));
        l.emplace_back(step.begin(), step.end());
      }
      if (first.empty()) first = l;
      CHECK(l == first);
    }
  }
}

TEST_CASE("sequences do not see each other") {
  LlamaModel m = random_llama(small_config(), 3, Format::kF32, 0, Format::kF32);
  auto backend = make_cpu_backend(2);
  Session alone(m, *backend, {.kv = KvType::kF32}), many(m, *backend, {.sequences = 3, .kv = KvType::kF32});
  const auto tokens = some_tokens(12);
  const auto expected = all_logits(alone, tokens);
  const auto other = some_tokens(30);
  many.feed(std::span(other).subspan(3, 20), 0);
  many.feed(std::span(other).subspan(1, 7), 2);
  for (size_t i = 0; i < tokens.size(); ++i) {
    const std::pair<int, int32_t> items[] = {{2, 11}, {1, tokens[i]}, {0, 7}};
    const auto l = many.step(items);
    CHECK(worst({l.begin() + 97, l.begin() + 2 * 97}, expected[i]) < 1e-5);
  }
}

TEST_CASE("block by block is the whole graph") {
  const LlamaConfig c = small_config();
  LlamaModel m = random_llama(c, 4, Format::kF32, 0, Format::kF32);
  auto backend = make_cpu_backend(2);
  Session session(m, *backend, {.kv = KvType::kF32});
  const auto tokens = some_tokens(16);
  const auto expected = all_logits(session, tokens);

  std::vector<float> x;
  std::vector<float> logits;
  for (int64_t l = 0; l < c.layers; ++l) {
    Graph g({16, 16});
    Inputs in;
    Tensor& out = build_llama(g, c, m.weights, in, {l, l + 1});
    std::vector<std::byte> arena(g.plan()), scratch(backend->scratch_bytes(g) + 64);
    g.bind(arena.data());
    KvCache kv{nullptr, KvType::kF32, 1, 1, 16, c.kv_dim()};
    std::vector<std::byte> cache(kv.bytes());
    kv.base = cache.data();
    std::vector<int32_t> iota(16), zero(16, 0);
    std::iota(iota.begin(), iota.end(), 0);
    const auto put = [&](Tensor* t, const void* v, size_t bytes) {
      if (t) std::memcpy(t->data, v, bytes);
    };
    put(in.token, tokens.data(), 64), put(in.position, iota.data(), 64), put(in.sequence, zero.data(), 64);
    put(in.wanted, iota.data(), 64), put(in.x, x.data(), x.size() * 4);
    int linears = 0;
    const Observer count = [&](const Tensor& t) { linears += t.op == Op::kLinear; };
    void* aligned = scratch.data();
    size_t room = scratch.size();
    std::align(64, room - 64, aligned, room);
    backend->run(g, {16, 16}, kv, static_cast<std::byte*>(aligned), &count);
    CHECK(linears == (l + 1 == c.layers ? 5 : 4));
    const int64_t n = 16 * (l + 1 == c.layers ? c.vocab : c.dim);
    (l + 1 == c.layers ? logits : x).assign(out.f32(), out.f32() + n);
  }
  for (size_t i = 0; i < 16; ++i)
    CHECK(std::equal(expected[i].begin(), expected[i].end(), logits.begin() + ptrdiff_t(i) * c.vocab));
}

TEST_CASE("what does not fit is refused with both numbers") {
  LlamaModel m = random_llama(small_config(), 5, Format::kQ4, 32, Format::kQ8);
  auto backend = make_cpu_backend(1);
  CHECK_THROWS_WITH_AS(Session(m, *backend, {.ctx = 65}), "context 65: the model allows 1..64", Error);
  Session s(m, *backend, {.ctx = 8});
  s.feed(some_tokens(6));
  CHECK_THROWS_WITH_AS(s.feed(some_tokens(3)), "3 tokens after 6 do not fit the context of 8", Error);
  CHECK(s.length() == 6);
  const int32_t beyond = 97;
  CHECK_THROWS_AS(s.feed(std::span(&beyond, 1)), Error);
}

TEST_CASE("a NaN stops the run and names its position") {
  LlamaModel m = random_llama(small_config(), 6, Format::kF32, 0, Format::kF32);
  auto backend = make_cpu_backend(1);
  Session s(m, *backend, {});  // fills the random weights
  reinterpret_cast<float*>(m.weights.blocks[1].down.bytes.data())[5] = NAN;
  CHECK_THROWS_WITH_AS(s.feed(some_tokens(4)), "logits are not finite after position 3 of sequence 0", Error);
}
