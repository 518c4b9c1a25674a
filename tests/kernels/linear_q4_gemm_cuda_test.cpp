// The handover of the int4 GEMM between a product that makes the residual stream and one that normalises it,
// against the definition in double; whatever the guess was, and the same bits twenty times.
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

  explicit Weights(const Q4Layout& l)
      : layout(l),
        data(size_t(l.n * l.k / 2)),
        scales(size_t(l.n * l.groups())),
        codes(l.code_bytes()),
        tile_scales(l.scale_bytes() / 2) {
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
    return double(half_to_float(scales[size_t(row * layout.groups() + k / layout.group)])) * (code - 8);
  }
};

struct Case {
  int64_t tokens, from, stream, to, group;  // columns of the maker, of the stream, rows of the reader
  Q4GemmOutput output;                      // of the reader
  float guess;                              // as a multiple of the true factor
};

Q4Layout layout(int64_t n, int64_t k, int64_t group, RowMap map) {
  Q4Layout l;
  l.n = n, l.k = k, l.group = std::min(group, k), l.map = map;
  return l;
}

void check(const Case& c) {
  CAPTURE(c.tokens);
  CAPTURE(c.stream);
  CAPTURE(c.to);
  CAPTURE(c.group);
  CAPTURE(c.guess);
  const int64_t t = c.tokens, d = c.stream, n = c.to;
  const bool swiglu = c.output == Q4GemmOutput::kSwiglu;
  constexpr float kEps = 1e-5f;
  Weights maker(layout(d, c.from, c.group, RowMap::kPlain));
  Weights reader(layout(n, d, c.group, swiglu ? RowMap::kPairHalves : RowMap::kPlain));
  std::mt19937_64 rng(5);
  std::normal_distribution<float> normal;
  std::vector<float> residual(static_cast<size_t>(t * d)), gain(static_cast<size_t>(d));
  for (float& v : residual) v = 3 * normal(rng);
  for (float& v : gain) v = 0.5f + std::abs(normal(rng));
  const int64_t pitch = q4_gemm_pitch(c.from);
  std::vector<uint16_t> x(static_cast<size_t>(t * pitch), 0);
  for (int64_t i = 0; i < t; ++i)
    for (int64_t j = 0; j < c.from; ++j) x[size_t(i * pitch + j)] = float_to_half(normal(rng));

  DeviceGuarded<float> d_residual{std::span<const float>(residual)}, d_gain{std::span<const float>(gain)};
  DeviceGuarded<uint16_t> d_x{std::span<const uint16_t>(x)};
  const int64_t columns = swiglu ? n / 2 : n;
  DeviceGuarded<float> y(t * d), y_alone(t * d), z(t * columns);
  DeviceGuarded<uint16_t> stream(t * d);
  DeviceGuarded<float> squares(d / kQ4TileRows * kQ4GemmFewTokens), guess(kQ4GemmFewTokens),
      next(kQ4GemmFewTokens);
  const Q4GemmHandover handover{d_gain.data(),  kEps,         stream.data(),
                                squares.data(), guess.data(), next.data()};
  const auto run = [&](Weights& w, const uint16_t* from, Q4GemmOutput output, const float* add, float* to,
                       const Q4GemmHandover* makes, const Q4GemmHandover* reads) {
    Q4GemmArgs a{};
    a.x = from, a.w = w.layout, a.codes = w.codes.data(), a.scales = w.tile_scales.data();
    a.tokens = t, a.output = output, a.y = to, a.residual = add;
    a.y_pitch = output == Q4GemmOutput::kSwiglu ? w.layout.n / 2 : w.layout.n;
    a.pdl = true, a.makes = makes, a.reads = reads;
    q4_gemm_cuda(a, q4_gemm_config_few({t, w.layout, device_facts().multiprocessors, true}), nullptr);
  };
  run(maker, d_x.data(), Q4GemmOutput::kStore, d_residual.data(), y_alone.data(), nullptr, nullptr);
  cuda_check(cudaDeviceSynchronize(), "a product");
  const std::vector<float> sum = y_alone.get();
  std::vector<double> factor(static_cast<size_t>(t));
  std::vector<float> guesses(size_t(kQ4GemmFewTokens), 1.f);
  for (int64_t i = 0; i < t; ++i) {
    double squared = 0;
    for (int64_t j = 0; j < d; ++j) squared += double(sum[size_t(i * d + j)]) * sum[size_t(i * d + j)];
    factor[size_t(i)] = 1 / std::sqrt(squared / double(d) + double(kEps));
    guesses[size_t(i)] = float(factor[size_t(i)]) * c.guess;
  }
  guess.put(guesses);

  std::vector<float> first;
  for (int run_of = 0; run_of < 20; ++run_of) {
    run(maker, d_x.data(), Q4GemmOutput::kStore, d_residual.data(), y.data(), &handover, nullptr);
    run(reader, stream.data(), c.output, nullptr, z.data(), nullptr, &handover);
    cuda_check(cudaDeviceSynchronize(), "two products");
    if (run_of == 0) first = z.get();
    REQUIRE(z.get() == first);
  }
  CHECK(y.get() == sum);
  const std::vector<float> given = next.get();
  double worst = 0;
  for (int64_t i = 0; i < t; ++i) {
    CHECK(given[size_t(i)] == doctest::Approx(factor[size_t(i)] * kQ4GemmHeadroom).epsilon(1e-6));
    std::vector<double> product(static_cast<size_t>(n)), bound(static_cast<size_t>(n));
    for (int64_t row = 0; row < n; ++row)
      for (int64_t k = 0; k < d; ++k) {
        const double w = reader.at(row, k), in = sum[size_t(i * d + k)] * factor[size_t(i)] * gain[size_t(k)];
        product[size_t(row)] += w * in;
        // x and, where they are not integers, weights in fp16, below its normal range in steps of 2^-24; sums
        // in f32.
        bound[size_t(row)] += std::abs(w * in) * (0x1p-10 + (double(d) / 16 + 32) * 0x1p-22) +
                              std::abs(w) * 0x1p-25 / c.guess + std::abs(in) * 0x1p-24;
      }
    for (int64_t j = 0; j < columns; ++j) {
      double want = product[size_t(j)], may = bound[size_t(j)];
      if (swiglu) {
        const double gate = want, up = product[size_t(j + columns)], eu = bound[size_t(j + columns)];
        const double silu = gate / (1 + std::exp(-gate));
        want = silu * up;
        may = 1.1 * may * (std::abs(up) + eu) + std::abs(silu) * eu +
              std::abs(want) * (8 + 2 * std::abs(gate)) * 0x1p-23;
      }
      worst = std::max(worst, std::abs(first[size_t(i * columns + j)] - want) / may);
    }
  }
  CHECK(worst <= 1);
}

}  // namespace

TEST_CASE("q4_gemm: handover of the residual stream to its norm") {
  if (no_device() || !device_facts().hopper) return;
  const auto store = Q4GemmOutput::kStore, swiglu = Q4GemmOutput::kSwiglu;
  check({16, 256, 128, 96, 128, swiglu, 1.f / 16});
  check({1, 100, 64, 33, 1 << 20, store, 1.f});
  check({9, 576, 576, 2 * 172, 64, swiglu, 1.f / 16});
  check({7, 1536, 576, 960, 128, store, 1e-3f});
  check({3, 172, 64, 80, 32, store, 500.f});
  check({12, 512, 4096, 700, 128, store, 1.f / 16});
}

TEST_CASE("q4_gemm: a stream that is not finite stays so") {
  if (no_device() || !device_facts().hopper) return;
  Weights w(layout(64, 64, 64, RowMap::kPlain));
  std::vector<float> residual(2 * 64, 1.f), gain(64, 1.f), guess(size_t(kQ4GemmFewTokens), 1.f);
  residual[70] = INFINITY;
  DeviceGuarded<float> d_residual{std::span<const float>(residual)}, d_gain{std::span<const float>(gain)},
      d_guess{std::span<const float>(guess)}, next(kQ4GemmFewTokens), y(2 * 64), z(2 * 64),
      squares(4 * kQ4GemmFewTokens);
  DeviceGuarded<uint16_t> x{std::span<const uint16_t>(std::vector<uint16_t>(2 * 64, float_to_half(0.1f)))},
      stream(2 * 64);
  const Q4GemmHandover handover{d_gain.data(),  1e-5f,          stream.data(),
                                squares.data(), d_guess.data(), next.data()};
  Q4GemmArgs a{};
  a.x = x.data(), a.w = w.layout, a.codes = w.codes.data(), a.scales = w.tile_scales.data();
  a.tokens = 2, a.output = Q4GemmOutput::kStore, a.y = y.data(), a.y_pitch = 64,
  a.residual = d_residual.data();
  a.makes = &handover;
  const Q4GemmConfig few = q4_gemm_config_few({2, w.layout, device_facts().multiprocessors, true});
  q4_gemm_cuda(a, few, nullptr);
  a.makes = nullptr, a.reads = &handover, a.x = stream.data(), a.y = z.data(), a.residual = nullptr;
  q4_gemm_cuda(a, few, nullptr);
  cuda_check(cudaDeviceSynchronize(), "two products");
  const std::vector<float> got = z.get();
  for (size_t i = 0; i < 64; ++i) {
    CHECK(std::isfinite(got[i]));
    CHECK(std::isnan(got[64 + i]));
  }

  Q4GemmArgs wrong = a;
  wrong.reads = nullptr, wrong.makes = &handover;
  CHECK_THROWS_AS(q4_gemm_cuda(wrong, q4_gemm_config_portable({2, w.layout, 132, true}), nullptr),
                  std::logic_error);
}

TEST_CASE("q4_gemm: few tokens, one block of a product on a multiprocessor") {
  if (no_device() || !device_facts().hopper) return;
  for (const Q4GemmOutput output : {Q4GemmOutput::kStore, Q4GemmOutput::kSwiglu, Q4GemmOutput::kRopeKv})
    CHECK(q4_gemm_few_resident(output) == 1);
}
