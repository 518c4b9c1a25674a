// embed, rms_norm, swiglu, rope_kv and rotate: hand-worked references, and the fast path against them over
// odd shapes at every instruction set, with 1 to 8 parts.
#include <cmath>
#include <tuple>
#include <vector>

#include "kernels/embed.h"
#include "kernels/half.h"
#include "kernels/rms_norm.h"
#include "kernels/rope_kv.h"
#include "kernels/rotate.h"
#include "kernels/swiglu.h"
#include "tests/kernels/cpu_levels.h"
#include "tests/kernels/guarded.h"

using namespace q4s;

namespace {

constexpr double kUlp = 0x1p-24;  // relative rounding of one f32 operation

// fn(a, part) of 2 to 8 parts writes the bits of one part.
template <typename Args, typename Fn>
void check_parts(Fn fn, Args a, Guarded<float>& y) {
  std::vector<float> first(y.begin(), y.end());
  for (int parts = 2; parts <= 8; ++parts) {
    std::fill(y.begin(), y.end(), NAN);
    for (int i = 0; i < parts; ++i) fn(a, Part{i, parts});
    REQUIRE(!std::memcmp(first.data(), y.data(), first.size() * 4));
  }
}

}  // namespace

TEST_CASE("embed_cpu: rows by id, any format") {
  const uint16_t table[] = {0x3c00, 0x4000, 0x4200, 0xbc00, 0x0000, 0x3800};
  const int32_t ids[] = {2, 0, 2};
  WeightView w{.format = Format::kF16, .n = 3, .k = 2, .data = reinterpret_cast<const uint8_t*>(table)};
  Guarded<float> y(6);
  EmbedArgs a{w, ids, y.data(), 3};
  embed_cpu(a);
  CHECK(std::vector<float>(y.begin(), y.end()) == std::vector<float>{0, 0.5f, 1, 2, 0, 0.5f});
  check_parts(embed_cpu, a, y);
}

TEST_CASE("rms_norm_cpu: hand-worked") {
  const float x[] = {3, 4}, w[] = {2, -1};
  float y[2];
  rms_norm_cpu({x, w, y, 1, 2, 0});  // mean square 12.5
  CHECK(y[0] == float(2 * 3 / std::sqrt(12.5)));
  CHECK(y[1] == float(-4 / std::sqrt(12.5)));
  rms_norm_cpu({x, w, y, 1, 2, 12.5f});
  CHECK(y[0] == doctest::Approx(6. / 5));
}

TEST_CASE("rms_norm against the definition") {
  on_every_level([] {
    for (int64_t dim : {1, 5, 16, 63, 64, 172, 576, 4097})
      for (int64_t tokens : {1, 3, 9}) {
        Guarded<float> x(tokens * dim), w(dim), want(tokens * dim), y(tokens * dim, NAN);
        fill_normal(x.span(), uint64_t(dim));
        fill_normal(w.span(), 1);
        RmsNormArgs a{x.data(), w.data(), want.data(), tokens, dim, 1e-5f};
        rms_norm_cpu(a);
        a.y = y.data();
        rms_norm(a);
        // The mean of squares, all positive: at most dim roundings in a sum, halved by the root; 5 more
        // around it.
        for (int64_t i = 0; i < x.size(); ++i)
          REQUIRE(std::abs(double(y[i]) - want[i]) <= (double(dim) / 2 + 6) * kUlp * std::abs(want[i]));
        check_parts(rms_norm, a, y);
        a.x = y.data();  // in place
        std::copy(x.begin(), x.end(), y.begin());
        rms_norm(a);
        for (int64_t i = 0; i < x.size(); ++i)
          REQUIRE(std::abs(double(y[i]) - want[i]) <= (double(dim) / 2 + 6) * kUlp * std::abs(want[i]));
      }
  });
}

TEST_CASE("swiglu: hand-worked, and the fast path within 6 ulp over the whole range") {
  const float x[] = {0, 1, -2, 5, 3, 10};
  float y[3];
  swiglu_cpu({x, y, 1, 3});
  CHECK(y[0] == 0);
  CHECK(y[1] == doctest::Approx(3 / (1 + std::exp(-1.))));
  CHECK(y[2] == doctest::Approx(-20 / (1 + std::exp(2.))));
  on_every_level([] {
    for (int64_t hidden : {1, 17, 172, 1000, 1536})
      for (int64_t tokens : {1, 4}) {
        Guarded<float> x(tokens * 2 * hidden), want(tokens * hidden), y(tokens * hidden, NAN);
        fill_normal(x.span(), uint64_t(hidden), 30);
        x[0] = 0;
        SwigluArgs a{x.data(), want.data(), tokens, hidden};
        swiglu_cpu(a);
        a.y = y.data();
        swiglu(a);
        // exp: 8e-8 of the reduction (n ln2 rounded) and 3 roundings; then add, divide, multiply. Below -88
        // both are within 2e-36 of zero, times up.
        for (int64_t i = 0; i < y.size(); ++i)
          REQUIRE(std::abs(double(y[i]) - want[i]) <= 6 * 2 * kUlp * std::abs(want[i]) + 1e-33);
        check_parts(swiglu, a, y);
      }
    float x[] = {NAN, 1, -1000, INFINITY, 1, NAN, 1, 1}, y[4];
    swiglu({x, y, 1, 4});
    CHECK(std::isnan(y[0]));
    CHECK(std::isnan(y[1]));
    CHECK(std::abs(y[2]) < 1e-30f);
    CHECK(y[3] == INFINITY);
  });
}

namespace {

struct Rope {
  int64_t tokens, heads, kv_heads, hd, ctx;
  Guarded<float> qkv, table;
  Guarded<int32_t> position, sequence;
  Rope(int64_t tokens, int64_t heads, int64_t kv_heads, int64_t hd, int64_t ctx)
      : tokens(tokens),
        heads(heads),
        kv_heads(kv_heads),
        hd(hd),
        ctx(ctx),
        qkv(tokens * (heads + 2 * kv_heads) * hd),
        table(ctx * hd),
        position(tokens),
        sequence(tokens) {
    fill_normal(qkv.span(), 7);
    for (int64_t p = 0; p < ctx; ++p)
      for (int64_t i = 0; i < hd / 2; ++i) {
        const double angle = double(p) * std::pow(10000., -2. * double(i) / double(hd));
        table[p * hd + 2 * i] = float(std::cos(angle));
        table[p * hd + 2 * i + 1] = float(std::sin(angle));
      }
    for (int64_t t = 0; t < tokens; ++t) {
      position[t] = int32_t(ctx - 1 - t / 2);
      sequence[t] = int32_t(t % 2);
    }
  }
  RopeKvArgs args(void* k, void* v, KvType type, float* q) const {
    return {qkv.data(),
            table.data(),
            {position.data(), sequence.data()},
            {k, v, type, ctx},
            q,
            tokens,
            heads,
            kv_heads,
            hd};
  }
};

template <typename T>
void check_rope(KvType type, double ulp) {
  for (auto [h, hkv, hd] :
       {std::tuple<int64_t, int64_t, int64_t>{1, 1, 2}, {8, 4, 8}, {9, 3, 64}, {2, 1, 300}})
    for (int64_t tokens : {1, 5}) {
      Rope r(tokens, h, hkv, hd, 6);
      const int64_t cache = 2 * 6 * hkv * hd;
      Guarded<float> q0(tokens * h * hd), q1(tokens * h * hd, NAN);
      Guarded<T> k0(cache), v0(cache), k1(cache), v1(cache);
      rope_kv_cpu(r.args(k0.data(), v0.data(), type, q0.data()));
      for (int parts = 1; parts <= 8; ++parts)
        for (int i = 0; i < parts; ++i) rope_kv(r.args(k1.data(), v1.data(), type, q1.data()), {i, parts});
      CHECK(v1.same_bits(v0));
      const auto value = [](T x) { return sizeof(T) == 4 ? double(x) : double(half_to_float(uint16_t(x))); };
      for (int64_t i = 0; i < q0.size(); ++i)
        REQUIRE(std::abs(double(q1[i]) - q0[i]) <= 12 * kUlp);  // |a|+|b| < 8
      for (int64_t i = 0; i < cache; ++i)
        REQUIRE(std::abs(value(k1[i]) - value(k0[i])) <= 12 * kUlp + ulp * std::abs(value(k0[i])));
    }
}

}  // namespace

TEST_CASE("rope_kv_cpu: hand-worked, and only the tokens' own cache rows are written") {
  Rope r(1, 1, 1, 2, 3);
  const float given[] = {1, 2, 3, 4, 5, 6};
  std::copy(given, given + 6, r.qkv.begin());
  r.table[4] = 0, r.table[5] = 1;  // position 2: a quarter turn
  Guarded<float> q(2), k(12, -9), v(12, -9);
  r.sequence[0] = 1;
  rope_kv_cpu(r.args(k.data(), v.data(), KvType::kF32, q.data()));
  CHECK(q[0] == -2);
  CHECK(q[1] == 1);
  for (int i = 0; i < 10; ++i) CHECK(k[i] == -9);
  CHECK(k[10] == -4);
  CHECK(k[11] == 3);
  CHECK(v[10] == 5);
  CHECK(v[11] == 6);
}

TEST_CASE("rope_kv against the definition") {
  on_every_level([] {
    check_rope<float>(KvType::kF32, 0);
    check_rope<uint16_t>(KvType::kF16, 0x1p-10);  // a neighbouring half at a rounding boundary
  });
}

TEST_CASE("store to a half cache rounds as float_to_half does, at every level") {
  on_every_level([] {
    const int64_t hd = 64, tokens = 300;
    Rope r(tokens, 1, 1, hd, 150);
    std::mt19937 rng(3);
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t i = 0; i < hd; ++i) {
        const uint32_t exp = 80 + rng() % 70,
                       bits = rng() & 0x807fffff;  // below, in and above the halves' range
        r.qkv[t * 3 * hd + 2 * hd + i] = std::bit_cast<float>(bits | exp << 23);
      }
    Guarded<float> q(tokens * hd);
    Guarded<uint16_t> k0(300 * hd), v0(300 * hd), k1(300 * hd), v1(300 * hd);
    rope_kv_cpu(r.args(k0.data(), v0.data(), KvType::kF16, q.data()));
    rope_kv(r.args(k1.data(), v1.data(), KvType::kF16, q.data()));
    CHECK(v1.same_bits(v0));
  });
}

TEST_CASE("rotate: hand-worked, orthogonal, and the fast path against the definition") {
  const float one[] = {1}, signs2[] = {1, -1}, x2[] = {3, 5};
  float y2[2];
  rotate_cpu({x2, signs2, one, y2, 1, 2, 1, false});  // (3, -5) H_2
  CHECK(y2[0] == doctest::Approx(-2 / std::sqrt(2.)));
  CHECK(y2[1] == doctest::Approx(8 / std::sqrt(2.)));
  const float swap[] = {0, 1, -1, 0}, ones[] = {1, 1};
  rotate_cpu({x2, ones, swap, y2, 1, 2, 2, false});  // x M
  CHECK(y2[0] == -5);
  CHECK(y2[1] == 3);
  rotate_cpu({y2, ones, swap, y2, 1, 2, 2, true});
  CHECK(y2[0] == 3);
  CHECK(y2[1] == 5);

  on_every_level([] {
    for (auto [dim, m] :
         {std::pair<int64_t, int64_t>{64, 1}, {576, 9}, {172, 43}, {130, 65}, {9, 9}, {4096, 1}})
      for (bool inverse : {false, true}) {
        const int64_t tokens = 5;
        Guarded<float> x(tokens * dim), signs(dim, 1), factor(m * m), want(tokens * dim),
            y(tokens * dim, NAN);
        fill_normal(x.span(), uint64_t(dim));
        for (int64_t i = 0; i < dim; ++i) signs[i] = i * 7 % 3 ? 1.f : -1.f;
        for (int64_t i = 0; i < m; ++i)  // a reflection: I - 2 v v^T with v = 1/sqrt(m)
          for (int64_t j = 0; j < m; ++j) factor[i * m + j] = float((i == j) - 2. / double(m));
        RotateArgs a{x.data(), signs.data(), factor.data(), want.data(), tokens, dim, m, inverse};
        rotate_cpu(a);
        a.y = y.data();
        rotate(a);
        // Each of log2(p) + m roundings moves the vector by 2^-24 of its length at most.
        const double bound = (14 + 2 * double(m)) * kUlp;
        for (int64_t t = 0; t < tokens; ++t) {
          double length = 0, moved = 0;
          for (int64_t i = 0; i < dim; ++i) {
            length += double(want[t * dim + i]) * want[t * dim + i];
            moved += std::pow(double(y[t * dim + i]) - want[t * dim + i], 2);
          }
          REQUIRE(std::sqrt(moved) <= bound * std::sqrt(length));
        }
        check_parts(rotate, a, y);
        a.x = y.data();
        a.inverse = !inverse;
        rotate(a);  // in place, and back
        for (int64_t i = 0; i < x.size(); ++i) REQUIRE(std::abs(y[i] - x[i]) <= 2e-5f);
      }
  });
}
