// attention() against its definition: odd head sizes, grouped heads, several sequences, f32 and f16 caches,
// rows beyond a token's position poisoned, 1 to 8 parts.
#include "kernels/attention.h"

#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "kernels/half.h"
#include "tests/kernels/cpu_levels.h"
#include "tests/kernels/guarded.h"

using namespace q4s;

namespace {

constexpr double kUlp = 0x1p-24;

struct Case {
  int64_t tokens, heads, kv_heads, hd, ctx;
  int sequences;
  KvType type;
};

// A prompt of consecutive positions per sequence, ending at the context's last row.
void check(const Case& c) {
  CAPTURE(c.tokens);
  CAPTURE(c.heads);
  CAPTURE(c.hd);
  CAPTURE(c.ctx);
  const int64_t width = c.kv_heads * c.hd, rows = c.sequences * c.ctx;
  Guarded<float> q(c.tokens * c.heads * c.hd), k(rows * width), v(rows * width);
  Guarded<float> want(q.size()), y(q.size(), NAN), z(q.size(), NAN);
  fill_normal(q.span(), 1);
  fill_normal(k.span(), 2);
  fill_normal(v.span(), 3);
  Guarded<int32_t> position(c.tokens), sequence(c.tokens);
  const int64_t each = ceil_div(c.tokens, c.sequences);
  std::vector<int64_t> seen(size_t(c.sequences), 0);
  for (int64_t t = 0; t < c.tokens; ++t) {
    sequence[t] = int32_t(t / each);
    position[t] = int32_t(c.ctx - 1 - each + t % each);  // the last row stays unused
    seen[size_t(t / each)] = position[t] + 1;
  }
  for (int s = 0; s < c.sequences; ++s)
    for (int64_t i = (s * c.ctx + seen[size_t(s)]) * width; i < (s + 1) * c.ctx * width; ++i)
      k[i] = v[i] = NAN;
  Guarded<uint16_t> hk(rows * width), hv(rows * width);
  for (int64_t i = 0; i < rows * width; ++i) hk[i] = float_to_half(k[i]), hv[i] = float_to_half(v[i]);
  const bool f32 = c.type == KvType::kF32;
  AttentionArgs a{q.data(),
                  {position.data(), sequence.data()},
                  {f32 ? static_cast<void*>(k.data()) : hk.data(),
                   f32 ? static_cast<void*>(v.data()) : hv.data(), c.type, c.ctx},
                  want.data(),
                  c.tokens,
                  c.heads,
                  c.kv_heads,
                  c.hd,
                  nullptr};
  attention_cpu(a);
  const auto run = [&](float* out, int parts) {
    Guarded<std::byte> scratch(int64_t(attention_scratch_bytes(c.ctx, c.hd, parts)));
    a.y = out;
    a.scratch = scratch.data();
    for (int i = 0; i < parts; ++i) attention(a, {i, parts});
  };
  run(y.data(), 1);
  // A score is off by (hd + 2) ulp of sum |q k| / sqrt(hd) <= about 3 sqrt(hd) here, and by as much its
  // weight, relatively; the weights' and values' sums add ctx + 8 ulp. |v| < 5.
  const double hd = double(c.hd), bound = 5 * kUlp * 2 * ((hd + 2) * 3 * std::sqrt(hd) + double(c.ctx) + 16);
  for (int64_t i = 0; i < y.size(); ++i) REQUIRE(std::abs(double(y[i]) - want[i]) <= bound);
  for (int parts = 2; parts <= 8; ++parts) {
    run(z.data(), parts);
    REQUIRE(z.same_bits(y));
  }
}

}  // namespace

TEST_CASE("attention_cpu: hand-worked") {
  // One head of size 1: scores 0, ln 3 at position 1, so that the weights are 1/4 and 3/4.
  const float q[] = {1, 1};
  float k[] = {0, float(std::log(3.)), NAN}, v[] = {4, 8, NAN}, y[2];
  const int32_t position[] = {1, 0}, sequence[] = {0, 0};
  attention_cpu({q, {position, sequence}, {k, v, KvType::kF32, 3}, y, 2, 1, 1, 1, nullptr});
  CHECK(y[0] == doctest::Approx(7));
  CHECK(y[1] == 4);
}

TEST_CASE("attention against the definition") {
  on_every_level([] {
    for (KvType type : {KvType::kF32, KvType::kF16}) {
      for (int64_t tokens : {1, 2, 7, 40})
        for (auto [h, hkv, hd] :
             {std::tuple<int64_t, int64_t, int64_t>{1, 1, 2}, {8, 4, 8}, {9, 3, 64}, {4, 4, 80}, {40, 1, 36}})
          for (int64_t extra : {1, 3, 64, 150}) check({tokens, h, hkv, hd, tokens + extra, 1, type});
      check({6, 8, 2, 16, 70, 3, type});
      check({64, 6, 2, 32, 40, 2, type});
    }
  });
}

TEST_CASE("attention: scores far apart, and a NaN shows") {
  on_every_level([] {
    const int64_t n = 200;
    Guarded<float> q(4, 10), k(n * 4), v(n * 4), y(4);
    for (int64_t j = 0; j < n; ++j)
      for (int i = 0; i < 4; ++i) k[j * 4 + i] = float(j) - 100, v[j * 4 + i] = float(j);
    const int32_t position = n - 1, sequence = 0;
    Guarded<std::byte> scratch(int64_t(attention_scratch_bytes(n, 4, 1)));
    AttentionArgs a{
        q.data(), {&position, &sequence}, {k.data(), v.data(), KvType::kF32, n}, y.data(), 1, 1, 1,
        4,        scratch.data()};
    attention(a);
    CHECK(y[0] == doctest::Approx(n - 1));  // the largest score takes all: scores grow by 20 a row
    for (float& x : k) x = -x;
    attention(a);
    CHECK(y[0] == doctest::Approx(0));
    k[120] = NAN;
    attention(a);
    CHECK(std::isnan(y[0]));
  });
}
