// Chains of the int4 GEMM against the definition in double; whatever the guess was, and the same bits twenty
// times.
#include <cmath>
#include <random>

#include "kernels/half.h"
#include "kernels/linear_q4_gemm.h"
#include "kernels/pdl.cuh"
#include "tests/kernels/device_guarded.h"

using namespace q4s;

namespace {

// Weights of one row after another, their tiles on the device.
struct Weights {
  Q4Layout layout;
  std::vector<uint8_t> data;
  std::vector<uint16_t> scales;
  DeviceGuarded<uint8_t> codes;
  DeviceGuarded<uint16_t> tile_scales;

  Grid grid;

  Weights(const Q4Layout& l, Grid g)
      : layout(l),
        data(size_t(l.n * l.k / 2)),
        scales(size_t(l.n * l.groups())),
        codes(l.code_bytes()),
        tile_scales(l.scale_bytes() / 2),
        grid(g) {
    std::mt19937_64 rng(uint64_t(l.n * 131 + l.k));
    for (uint8_t& b : data) b = uint8_t(rng());
    for (uint16_t& s : scales) s = float_to_half(0.004f * (0.5f + float(rng() % 100) / 100));
    std::vector<uint8_t> packed(size_t(l.code_bytes()));
    std::vector<uint16_t> packed_scales(size_t(l.scale_bytes() / 2));
    q4_pack_cpu(l, {data.data(), scales.data()}, packed.data(), packed_scales.data());
    codes.put(packed), tile_scales.put(packed_scales);
  }
  double at(int64_t row, int64_t k) const {
    const int code = data[size_t((row * layout.k + k) / 2)] >> (k % 2 * 4) & 15;
    return double(half_to_float(scales[size_t(row * layout.groups() + k / layout.group)])) *
           (code - (grid == Grid::kInt ? 8 : 7.5));
  }
};

struct Case {
  int64_t tokens, dim, heads, hidden;  // heads: of 32 columns, one of which keys and values have
  int64_t group;
  Grid grid;
  float guess;  // as a multiple of the true factor
};

Q4Layout layout(int64_t n, int64_t k, int64_t group, RowMap map) {
  Q4Layout l;
  l.n = n, l.k = k, l.group = std::min(group, k), l.map = map;
  return l;
}

// Rows of a product and what they may err by: x in fp16 with errors of `x_error` and, below fp16's normal
// range, of `x_step`; weights, where they are not integers, in fp16; sums in f32.
struct Product {
  std::vector<double> value, bound;
  Product(const Weights& w, const std::vector<double>& x, double x_error, const std::vector<double>& x_step)
      : value(size_t(int64_t(x.size()) / w.layout.k * w.layout.n)), bound(value.size()) {
    const int64_t k = w.layout.k, n = w.layout.n, tokens = int64_t(x.size()) / k;
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t row = 0; row < n; ++row) {
        double sum = 0, may = 0;
        for (int64_t j = 0; j < k; ++j) {
          const double weight = w.at(row, j), in = x[size_t(t * k + j)];
          sum += weight * in;
          may += std::abs(weight * in) * (0x1p-11 + x_error + (double(k) / 16 + 32) * 0x1p-22) +
                 std::abs(weight) * x_step[size_t(t)] + std::abs(in) * 0x1p-24;
        }
        value[size_t(t * n + row)] = sum, bound[size_t(t * n + row)] = may;
      }
  }
};

// o, gate|up, down and qkv as they follow each other, each against the product in double of what the device
// made before it.
void check(const Case& c) {
  CAPTURE(c.tokens);
  CAPTURE(c.dim);
  CAPTURE(c.hidden);
  CAPTURE(c.group);
  CAPTURE(c.guess);
  constexpr int64_t kHead = 32, kCtx = 40;
  constexpr float kEps = 1e-5f;
  const int64_t t = c.tokens, d = c.dim, f = c.hidden, qkv = (c.heads + 2) * kHead, from = c.heads * kHead;
  Q4Layout rope = layout(qkv, d, c.group, RowMap::kRope);
  rope.head_dim = kHead, rope.rotated = (c.heads + 1) * kHead;
  Weights o(layout(d, from, c.group, RowMap::kPlain), c.grid),
      gate_up(layout(2 * f, d, c.group, RowMap::kPairHalves), c.grid),
      down(layout(d, f, c.group, RowMap::kPlain), c.grid), next(rope, c.grid);
  std::mt19937_64 rng(5);
  std::normal_distribution<float> normal;
  const auto random = [&](int64_t count, float scale) {
    std::vector<float> v(static_cast<size_t>(count));
    for (float& e : v) e = scale * normal(rng);
    return v;
  };
  const std::vector<float> residual = random(t * d, 3);
  std::vector<float> gain = random(d, 1), table(size_t(kCtx * kHead)), x0 = random(t * from, 1);
  for (float& v : gain) v = 0.5f + std::abs(v);
  for (size_t i = 0; i + 1 < table.size(); i += 2)
    table[i] = std::cos(float(i) * 0.37f), table[i + 1] = std::sin(float(i) * 0.37f);
  std::vector<int32_t> position(static_cast<size_t>(t)), sequence(position.size(), 0);
  for (size_t i = 0; i < position.size(); ++i) position[i] = int32_t(i * 7 % kCtx);
  const int64_t pitch = q4_gemm_pitch(from);
  std::vector<uint16_t> x(static_cast<size_t>(t * pitch), 0);
  for (int64_t i = 0; i < t; ++i)
    for (int64_t j = 0; j < from; ++j) {
      x[size_t(i * pitch + j)] = float_to_half(x0[size_t(i * from + j)]);
      x0[size_t(i * from + j)] = half_to_float(x[size_t(i * pitch + j)]);
    }

  DeviceGuarded<float> d_residual{std::span<const float>(residual)}, d_gain{std::span<const float>(gain)},
      d_table{std::span<const float>(table)}, stream(t * d), last(t * d), q(t * from), k(kCtx * kHead),
      v(kCtx * kHead);
  DeviceGuarded<int32_t> d_position{std::span<const int32_t>(position)},
      d_sequence{std::span<const int32_t>(sequence)};
  DeviceGuarded<uint16_t> d_x{std::span<const uint16_t>(x)}, between(t * f);
  DeviceGuarded<std::byte> exchange{int64_t(kQ4GemmExchange)};
  cuda_check(cudaMemset(exchange.data(), 0, kQ4GemmExchange), "the exchange");
  float* const guess = q4_gemm_guess(exchange.data());

  const auto args = [&](Weights& w, Q4GemmOutput output, void* y) {
    Q4GemmArgs a{};
    a.w = w.layout, a.grid = c.grid, a.codes = w.codes.data(), a.scales = w.tile_scales.data();
    a.tokens = t, a.output = output, a.y = y, a.y_pitch = w.layout.n, a.pdl = true, a.eps = kEps;
    return a;
  };
  Q4GemmArgs all[] = {
      args(o, Q4GemmOutput::kStore, stream.data()), args(gate_up, Q4GemmOutput::kSwiglu, between.data()),
      args(down, Q4GemmOutput::kStore, last.data()), args(next, Q4GemmOutput::kRopeKv, q.data())};
  all[0].x = d_x.data(), all[0].residual = d_residual.data(), all[2].residual = stream.data();
  all[1].gain = all[3].gain = d_gain.data();
  all[1].y_half = true, all[1].y_pitch = f, all[3].y_pitch = from;
  all[3].table = d_table.data(), all[3].at = {d_position.data(), d_sequence.data()};
  all[3].kv = {k.data(), v.data(), KvType::kF32, kCtx}, all[3].heads = c.heads, all[3].kv_heads = 1;

  // What the guess is wrong by says what the values in fp16 lose.
  const auto factors = [&](const std::vector<float>& of) {
    std::vector<double> factor(static_cast<size_t>(t));
    for (int64_t i = 0; i < t; ++i) {
      double squared = 0;
      for (int64_t j = 0; j < d; ++j) squared += double(of[size_t(i * d + j)]) * of[size_t(i * d + j)];
      factor[size_t(i)] = 1 / std::sqrt(squared / double(d) + double(kEps));
    }
    return factor;
  };
  q4_gemm_cuda(all[0], q4_gemm_config_few({t, o.layout, device_facts().multiprocessors, true}), nullptr);
  cuda_check(cudaDeviceSynchronize(), "a product");
  const std::vector<double> about = factors(stream.get());
  std::vector<float> guesses(static_cast<size_t>(t));
  for (size_t i = 0; i < guesses.size(); ++i) guesses[i] = float(about[i]) * c.guess;

  std::vector<float> sum, first_q, first_k, first_v, first_last;
  std::vector<uint16_t> first_between;
  for (int run = 0; run < (quick() > 1 ? 3 : 20); ++run) {
    // Shorter chains serve the exchange alike.
    if (run % 3 == 1) q4_gemm_chain_cuda(all, 2 + size_t(run % 2), exchange.data(), nullptr);
    cuda_check(cudaMemcpy(guess, guesses.data(), guesses.size() * 4, cudaMemcpyHostToDevice), "guesses");
    q4_gemm_chain_cuda(all, 4, exchange.data(), nullptr);
    cuda_check(cudaDeviceSynchronize(), "a chain");
    if (run == 0)
      sum = stream.get(), first_q = q.get(), first_k = k.get(), first_v = v.get(),
      first_between = between.get(), first_last = last.get();
    REQUIRE(stream.get() == sum);
    REQUIRE(between.get() == first_between);
    REQUIRE(last.get() == first_last);
    REQUIRE((q.get() == first_q && k.get() == first_k && v.get() == first_v));
  }
  const std::vector<double> factor = factors(sum);

  double worst = 0;
  const auto one = [&](double got, double want, double may) {
    worst = std::max(worst, std::isfinite(got) ? std::abs(got - want) / may : 1e30);
  };
  const std::vector<double> none(static_cast<size_t>(t), 0.0);
  {
    const Product p(o, std::vector<double>(x0.begin(), x0.end()), 0, none);
    for (size_t i = 0; i < sum.size(); ++i) {
      const double want = p.value[i] + double(residual[i]);
      one(double(sum[i]), want, p.bound[i] + std::abs(want) * 0x1p-22);
    }
  }
  const auto normalised = [&](const std::vector<float>& of, const std::vector<double>& by) {
    std::vector<double> in(of.size());
    for (size_t i = 0; i < in.size(); ++i)
      in[i] = double(of[i]) * by[i / size_t(d)] * double(gain[i % size_t(d)]);
    return in;
  };
  {
    std::vector<double> step(static_cast<size_t>(t), 0x1p-25 / double(c.guess));
    const Product p(gate_up, normalised(sum, factor), 0x1p-11 + 0x1p-20, step);
    for (int64_t i = 0; i < t; ++i)
      for (int64_t j = 0; j < f; ++j) {
        const size_t g = size_t(i * 2 * f + j), u = g + size_t(f);
        const double gate = p.value[g], up = p.value[u], eg = p.bound[g], eu = p.bound[u];
        const double silu = gate / (1 + std::exp(-gate)), want = silu * up;
        one(double(half_to_float(first_between[size_t(i * f + j)])), want,
            1.1 * eg * (std::abs(up) + eu) + std::abs(silu) * eu +
                std::abs(want) * (0x1p-11 + (8 + 2 * std::abs(gate)) * 0x1p-23) + 0x1p-25);
      }
  }
  {
    std::vector<double> in;
    for (uint16_t h : first_between) in.push_back(double(half_to_float(h)));
    const Product p(down, in, 0, none);
    for (size_t i = 0; i < sum.size(); ++i) {
      const double want = p.value[i] + double(sum[i]);
      one(double(first_last[i]), want, p.bound[i] + std::abs(want) * 0x1p-22);
    }
  }
  const std::vector<double> last_factor = factors(first_last);
  {
    std::vector<double> step(static_cast<size_t>(t));  // its guess: the factor of the stream before
    for (size_t i = 0; i < step.size(); ++i)
      step[i] = 0x1p-25 * last_factor[i] / (factor[i] * double(kQ4GemmHeadroom));
    const Product p(next, normalised(first_last, last_factor), 0x1p-11 + 0x1p-20, step);
    for (int64_t i = 0; i < t; ++i)
      for (int64_t row = 0; row < qkv; ++row) {
        const int64_t head = row / kHead, in_head = row % kHead, at = position[size_t(i)];
        const size_t self = size_t(i * qkv + row);
        if (head > c.heads) {
          one(double(first_v[size_t(at * kHead + in_head)]), p.value[self], p.bound[self]);
          continue;
        }
        const bool low = in_head < kHead / 2;
        const size_t other = low ? self + kHead / 2 : self - kHead / 2;
        const size_t turn = size_t(at * kHead + in_head % (kHead / 2) * 2);
        const double cosine = double(table[turn]), sine = double(table[turn + 1]) * (low ? -1 : 1);
        const double got = head < c.heads ? double(first_q[size_t(i * from + row)])
                                          : double(first_k[size_t(at * kHead + in_head)]);
        one(got, p.value[self] * cosine + p.value[other] * sine,
            p.bound[self] + p.bound[other] + (std::abs(p.value[self]) + std::abs(p.value[other])) * 0x1p-22);
      }
  }
  CHECK(worst <= 1);
  cuda_check(cudaMemcpy(guesses.data(), guess, guesses.size() * 4, cudaMemcpyDeviceToHost), "guesses");
  for (size_t i = 0; i < guesses.size(); ++i)
    CHECK(double(guesses[i]) == doctest::Approx(last_factor[i] * double(kQ4GemmHeadroom)).epsilon(1e-6));
}

}  // namespace

TEST_CASE("q4_gemm: chains of few tokens") {
  if (no_device() || !device_facts().hopper) return;
  check({16, 256, 3, 320, 128, Grid::kInt, 1.f / 16});
  check({1, 64, 1, 64, 1 << 20, Grid::kInt, 1.f});
  check({9, 576, 9, 1536, 64, Grid::kInt, 1.f / 16});
  check({7, 576, 4, 192, 32, Grid::kHalf, 1e-3f});
  check({3, 128, 2, 704, 32, Grid::kInt, 500.f});
  check({5, 512, 34, 192, 128, Grid::kInt, 1.f / 16});  // clusters that have rows of the last product only
  if (quick() > 1) return;
  check({12, 2048, 5, 5632, 128, Grid::kHalf, 1.f / 16});
  check({16, 4096, 32, 2752, 128, Grid::kInt, 1.f / 16});
}

TEST_CASE("q4_gemm: a stream that is not finite stays so") {
  if (no_device() || !device_facts().hopper) return;
  Weights w(layout(64, 64, 64, RowMap::kPlain), Grid::kInt);
  std::vector<float> residual(2 * 64, 1.f), gain(64, 1.f);
  residual[70] = INFINITY;
  DeviceGuarded<float> d_residual{std::span<const float>(residual)}, d_gain{std::span<const float>(gain)},
      y(2 * 64), z(2 * 64);
  DeviceGuarded<uint16_t> x{std::span<const uint16_t>(std::vector<uint16_t>(2 * 64, float_to_half(0.1f)))};
  DeviceGuarded<std::byte> exchange{int64_t(kQ4GemmExchange)};
  cuda_check(cudaMemset(exchange.data(), 0, kQ4GemmExchange), "the exchange");
  const std::vector<float> guess(2, 1.f);
  cuda_check(cudaMemcpy(q4_gemm_guess(exchange.data()), guess.data(), 8, cudaMemcpyHostToDevice), "guesses");
  Q4GemmArgs all[2] = {};
  for (Q4GemmArgs& a : all)
    a.w = w.layout, a.codes = w.codes.data(), a.scales = w.tile_scales.data(), a.tokens = 2,
    a.output = Q4GemmOutput::kStore, a.y_pitch = 64, a.eps = 1e-5f;
  all[0].x = x.data(), all[0].residual = d_residual.data(), all[0].y = y.data();
  all[1].gain = d_gain.data(), all[1].y = z.data();
  q4_gemm_chain_cuda(all, 2, exchange.data(), nullptr);
  cuda_check(cudaDeviceSynchronize(), "two products");
  const std::vector<float> got = z.get();
  for (size_t i = 0; i < 64; ++i) {
    CHECK(std::isfinite(got[i]));
    CHECK(std::isnan(got[64 + i]));
  }
}

TEST_CASE("q4_gemm: what is not a number stays so, and with its token") {
  if (no_device() || !device_facts().hopper) return;
  constexpr int64_t kTokens = 20, kBad = 3;
  for (const Q4GemmOutput output : {Q4GemmOutput::kStore, Q4GemmOutput::kSwiglu})
    for (const bool half : {false, true}) {
      CAPTURE(int(output));
      CAPTURE(half);
      const bool swiglu = output == Q4GemmOutput::kSwiglu;
      Weights w(layout(256, 512, 128, swiglu ? RowMap::kPairHalves : RowMap::kPlain), Grid::kInt);
      std::vector<uint16_t> x(kTokens * 512, float_to_half(0.1f));
      x[kBad * 512 + 100] = 0x7e00;
      DeviceGuarded<uint16_t> d_x{std::span<const uint16_t>(x)};
      const auto run = [&](const Q4GemmConfig& config, int64_t tokens) {
        CAPTURE(config.print());
        const int64_t columns = swiglu ? 128 : 256;
        DeviceGuarded<float> y(tokens * columns);
        DeviceGuarded<std::byte> workspace{int64_t(config.workspace_bytes)};
        cuda_check(cudaMemset(workspace.data(), 0, config.workspace_bytes), "workspace");
        Q4GemmArgs a{};
        a.x = d_x.data(), a.w = w.layout, a.codes = w.codes.data(), a.scales = w.tile_scales.data();
        a.tokens = tokens, a.output = output, a.y = y.data(), a.y_half = half, a.y_pitch = columns;
        a.workspace = workspace.data();
        q4_gemm_cuda(a, config, nullptr);
        cuda_check(cudaDeviceSynchronize(), "a product");
        const std::vector<float> got = y.get();
        int64_t wrong = 0;
        for (int64_t i = 0; i < tokens * columns; ++i) {
          const float v =
              half ? half_to_float(reinterpret_cast<const uint16_t*>(got.data())[i]) : got[size_t(i)];
          wrong += std::isnan(v) != (i / columns == kBad) || std::isinf(v);
        }
        CHECK(wrong == 0);
      };
      const auto shape = [&](int64_t tokens) {
        return Q4GemmShape{tokens, w.layout, device_facts().multiprocessors, true};
      };
      run(q4_gemm_config_few(shape(7)), 7);
      run(q4_gemm_config_portable(shape(kTokens)), kTokens);
      for (const Q4GemmTile& t : kQ4GemmSplitTiles) run(q4_gemm_config_split(shape(kTokens), t, 2), kTokens);
      for (const Q4GemmTile& t : kQ4GemmStreamTiles)
        run(q4_gemm_config_stream(shape(kTokens), t, true), kTokens);
    }
}

// Columns that are no whole tile, groups of one to all of them, rows of tokens below, at and beyond a tile's.
TEST_CASE("q4_gemm: int8 against the definition") {
  if (no_device()) return;
  std::mt19937_64 rng(11);
  for (int64_t k : {64, 328, 1024})
    for (int64_t group : {int64_t(32), int64_t(128), k})
      for (int64_t tokens : {9, 16, 17, 64, 70}) {
        CAPTURE(k);
        CAPTURE(group);
        CAPTURE(tokens);
        Q4Layout l = layout(150, k, group, RowMap::kPlain);
        l.bits = 8;
        const int64_t pitch = q4_gemm_pitch(k);
        std::vector<uint8_t> codes(size_t(l.n * k)), packed(size_t(l.code_bytes()));
        for (uint8_t& c : codes) c = uint8_t(rng());
        std::vector<uint16_t> scales(size_t(l.n * l.groups())), packed_scales(size_t(l.scale_bytes() / 2));
        for (uint16_t& v : scales) v = float_to_half((rng() % 2 ? 1 : -1) * 0.0005f * float(1 + rng() % 7));
        q4_pack_cpu(l, {codes.data(), scales.data()}, packed.data(), packed_scales.data());
        std::vector<uint16_t> x(size_t(tokens * pitch));
        for (int64_t t = 0; t < tokens; ++t)
          for (int64_t j = 0; j < k; ++j)
            x[size_t(t * pitch + j)] = float_to_half(float(int64_t(rng() % 2001) - 1000) * 0.001f);
        const Q4GemmConfig config = q4_gemm_config({tokens, l, device_facts().multiprocessors, true});
        REQUIRE(config.kernel == Q4GemmKernel::kPortable);
        DeviceGuarded<uint8_t> d_codes{std::span<const uint8_t>(packed)};
        DeviceGuarded<uint16_t> d_scales{std::span<const uint16_t>(packed_scales)},
            d_x{std::span<const uint16_t>(x)};
        DeviceGuarded<float> y(tokens * l.n);
        DeviceGuarded<std::byte> workspace{int64_t(config.workspace_bytes)};
        cuda_check(cudaMemset(workspace.data(), 0, config.workspace_bytes), "workspace");
        Q4GemmArgs a{};
        a.x = d_x.data(), a.w = l, a.codes = d_codes.data(), a.scales = d_scales.data(), a.tokens = tokens;
        a.output = Q4GemmOutput::kStore, a.y = y.data(), a.y_pitch = l.n, a.workspace = workspace.data();
        q4_gemm_cuda(a, config, nullptr);
        cuda_check(cudaDeviceSynchronize(), "a product");
        const std::vector<float> got = y.get();
        int64_t wrong = 0;
        for (int64_t t = 0; t < tokens; ++t)
          for (int64_t n = 0; n < l.n; ++n) {
            double want = 0, magnitude = 0;
            for (int64_t j = 0; j < k; ++j) {
              const double v = double(half_to_float(scales[size_t(n * l.groups() + j / l.group)])) *
                               int8_t(codes[size_t(n * k + j)]) * half_to_float(x[size_t(t * pitch + j)]);
              want += v, magnitude += std::abs(v);
            }
            // Weights rounded to fp16, fp32 sums.
            wrong += !(std::abs(got[size_t(t * l.n + n)] - want) <= magnitude * (0x1p-11 + 0x1p-14) + 1e-6);
          }
        CHECK(wrong == 0);
      }
}

TEST_CASE("q4_gemm: what cannot be a chain") {
  if (no_device() || !device_facts().hopper) return;
  Weights w(layout(64, 64, 64, RowMap::kPlain), Grid::kInt);
  const float gain = 1;
  Q4GemmArgs all[2] = {};
  for (Q4GemmArgs& a : all) a.w = w.layout, a.tokens = 2, a.output = Q4GemmOutput::kStore, a.gain = &gain;
  CHECK(q4_gemm_follows(all[1], all[0]));
  Q4GemmArgs other = all[1];
  other.tokens = 3;
  CHECK(!q4_gemm_follows(other, all[0]));
  other = all[1], other.gain = nullptr;
  CHECK(!q4_gemm_follows(other, all[0]));
  other = all[1], other.w.k = 128;
  CHECK(!q4_gemm_follows(other, all[0]));
  other = all[0], other.y_half = true;
  CHECK(!q4_gemm_follows(all[1], other));
  // The first has no x.
  CHECK_THROWS_AS(q4_gemm_chain_cuda(all, 2, nullptr, nullptr), std::logic_error);
  CHECK_THROWS_AS(q4_gemm_cuda(all[0], q4_gemm_config_few({2, w.layout, 132, true}), nullptr),
                  std::logic_error);
}
