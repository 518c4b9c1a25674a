// The decode products on the device against the definitions of the CPU: every format, grid and group, odd
// shapes, each prologue and epilogue, 1 to 16 tokens; buffers guarded, results the same bits when run again.
#include <cmath>
#include <memory>

#include "kernels/half.h"
#include "kernels/linear.h"
#include "kernels/linear_decode.h"
#include "kernels/rms_norm.h"
#include "kernels/swiglu.h"
#include "tests/kernels/device_guarded.h"
#include "tests/kernels/guarded.h"

using namespace q4s;

namespace {

struct Case {
  Q4Layout layout;
  Grid grid = Grid::kInt;
  int64_t tokens = 1;
  bool norm = false, residual = false;
  Epilogue epilogue = Epilogue::kNone;
  int64_t heads = 0, kv_heads = 0;
  KvType kv = KvType::kF16;
  float size = 1;  // of x
};

// Canonical weights of any width and their device tiles, packed on the device.
struct Weights {
  std::vector<uint8_t> data;
  std::vector<uint16_t> scales;
  WeightView view;
  DeviceGuarded<uint8_t> codes;
  DeviceGuarded<uint16_t> tile_scales;

  explicit Weights(const Case& c)
      : data(size_t(c.layout.n * row_bytes(format(c), c.layout.k))),
        scales(size_t(c.layout.n * c.layout.groups())),
        codes(c.layout.code_bytes()),
        tile_scales(c.layout.scale_bytes() / 2) {
    const Q4Layout& l = c.layout;
    std::mt19937_64 rng(uint64_t(l.n * 131 + l.k));
    for (uint8_t& b : data) b = uint8_t(rng());
    if (l.bits == 8)
      for (uint8_t& b : data) b = b == 0x80 ? 0x81 : b;
    if (l.bits == 16) {
      std::normal_distribution<float> normal(0, 0.05f);
      for (size_t i = 0; i < data.size(); i += 2) {
        const uint16_t h = float_to_half(normal(rng));
        std::memcpy(&data[i], &h, 2);
      }
    }
    for (uint16_t& s : scales)
      s = float_to_half((rng() % 2 ? 1 : -1) * (l.bits == 8 ? 0.0005f : 0.008f) *
                        (0.5f + float(rng() % 100) / 100));
    view = {.format = format(c),
            .grid = c.grid,
            .n = l.n,
            .k = l.k,
            .group = l.group,
            .data = data.data(),
            .scales = scales.data()};
    DeviceGuarded<uint8_t> from{std::span<const uint8_t>(data)};
    DeviceGuarded<uint16_t> from_scales{std::span<const uint16_t>(scales)};
    q4_pack_cuda(l, {from.data(), from_scales.data()}, codes.data(), tile_scales.data(), nullptr);
    std::vector<uint8_t> want(size_t(l.code_bytes()));
    std::vector<uint16_t> want_scales(size_t(l.scale_bytes() / 2));
    q4_pack_cpu(l, {data.data(), scales.data()}, want.data(), want_scales.data());
    REQUIRE(codes.get() == want);
    REQUIRE(tile_scales.get() == want_scales);
  }
  static Format format(const Case& c) {
    return c.layout.bits == 4 ? Format::kQ4 : c.layout.bits == 8 ? Format::kQ8 : Format::kF16;
  }
};

// Every x is rounded to 16 significant bits, |error| <= 2^-17 sum |w x|. fp16 weights: then to fp16, |error|
// <= 2^-11 sum |w x|. Integer codes: then to a step of 1 / 32639 of the largest, |error| <= sum |w| * largest
// / 2 / 32639. Beside that f32 sums of far smaller error and, with a norm, the factor's few ulps on each.
void check(const Case& c) {
  const Q4Layout& l = c.layout;
  CAPTURE(l.n);
  CAPTURE(l.k);
  CAPTURE(l.group);
  CAPTURE(l.bits);
  CAPTURE(int(c.grid));
  CAPTURE(c.tokens);
  CAPTURE(int(c.epilogue));
  Weights w(c);
  const int64_t t = c.tokens, hd = l.head_dim, ctx = 7, sequences = 3;
  std::vector<float> x(size_t(t * l.k)), gain(size_t(l.k)), residual(size_t(t * l.n)), normed(x.size());
  fill_normal(x, 1, c.size);
  fill_normal(gain, 2);
  fill_normal(residual, 3);
  normed = x;
  const float eps = 1e-5f;
  if (c.norm)
    rms_norm_cpu({.x = x.data(), .w = gain.data(), .y = normed.data(), .tokens = t, .dim = l.k, .eps = eps});

  // Product and error bound, in the file's rows.
  std::vector<double> want(size_t(t * l.n)), bound(size_t(t * l.n));
  std::vector<float> row(static_cast<size_t>(l.k));
  for (int64_t n = 0; n < l.n; ++n) {
    dequantize_rows(w.view, n, n + 1, row.data());
    for (int64_t i = 0; i < t; ++i) {
      double sum = 0, size = 0, weights = 0, top = 0;
      for (int64_t k = 0; k < l.k; ++k) {
        sum += double(row[k]) * normed[i * l.k + k];
        size += std::abs(double(row[k]) * normed[i * l.k + k]);
        weights += std::abs(double(row[k]));
        top = std::max(top, std::abs(double(normed[i * l.k + k])));
      }
      want[i * l.n + n] = sum + (c.residual ? residual[i * l.n + n] : 0);
      const double rounding = l.bits == 16 ? size * 0x1p-11 : weights * top / 2 / 32639;
      bound[i * l.n + n] =
          rounding * (1 + 0x1p-16) + size * (0x1p-17 + 0x1p-18) + 0x1p-22 * std::abs(want[i * l.n + n]);
    }
  }

  DeviceGuarded<float> dx{std::span<const float>(x)}, dgain{std::span<const float>(gain)},
      dresidual{std::span<const float>(residual)};
  const int64_t q_cols = c.heads * hd, kv_cols = c.kv_heads * hd;
  const int64_t cols = c.epilogue == Epilogue::kSwiglu   ? l.n / 2
                       : c.epilogue == Epilogue::kRopeKv ? q_cols
                                                         : l.n;
  DeviceGuarded<float> dy(t * cols);
  std::vector<float> table(size_t(ctx * std::max<int64_t>(hd, 2)));
  for (size_t i = 0; i < table.size(); i += 2) {
    table[i] = float(std::cos(0.37 * double(i)));
    table[i + 1] = float(std::sin(0.37 * double(i)));
  }
  std::vector<int32_t> position, sequence;
  for (int64_t i = 0; i < t; ++i) {
    position.push_back(int32_t((i * 2 + 3) % ctx));
    sequence.push_back(int32_t(i / ctx));
  }
  DeviceGuarded<float> dtable{std::span<const float>(table)};
  DeviceGuarded<int32_t> dposition{std::span<const int32_t>(position)},
      dsequence{std::span<const int32_t>(sequence)};
  const int64_t cache_bytes = std::max<int64_t>(sequences * ctx * kv_cols, 1) * kv_type_bytes(c.kv);
  DeviceGuarded<uint8_t> dk(cache_bytes), dv(cache_bytes);

  LinearDecodeArgs a{
      .x = dx.data(), .w = {l, c.grid, w.codes.data(), w.tile_scales.data()}, .y = dy.data(), .tokens = t};
  if (c.norm) a.gain = dgain.data(), a.eps = eps;
  if (c.residual) a.residual = dresidual.data();
  a.epilogue = c.epilogue;
  if (c.epilogue == Epilogue::kRopeKv) {
    a.table = dtable.data();
    a.at = {dposition.data(), dsequence.data()};
    a.kv = {dk.data(), dv.data(), c.kv, ctx};
    a.heads = c.heads;
    a.kv_heads = c.kv_heads;
  }
  linear_decode_cuda(&a, 1, nullptr, nullptr, false);
  cuda_check(cudaDeviceSynchronize(), "linear_decode");
  const std::vector<float> y = dy.get();

  const auto near = [](double got, double expected, double limit) {
    CAPTURE(got);
    CAPTURE(expected);
    CAPTURE(limit);
    REQUIRE(std::abs(got - expected) <= limit);
  };
  if (c.epilogue == Epilogue::kNone) {
    for (int64_t i = 0; i < t * l.n; ++i) near(y[i], want[i], bound[i]);
  } else if (c.epilogue == Epilogue::kSwiglu) {
    for (int64_t i = 0; i < t; ++i)
      for (int64_t n = 0; n < cols; ++n) {
        const double g = want[i * l.n + n], u = want[i * l.n + cols + n], silu = g / (1 + std::exp(-g));
        const double limit = 1.1 * std::abs(u) * bound[i * l.n + n] +
                             (std::abs(silu) + 1.1 * bound[i * l.n + n]) * bound[i * l.n + cols + n] +
                             0x1p-20 * std::abs(silu * u);
        near(y[i * cols + n], silu * u, limit + 1e-30);
      }
  } else {
    const std::vector<uint8_t> k = dk.get(), v = dv.get();
    const auto cached = [&](const std::vector<uint8_t>& from, int64_t at) -> double {
      if (c.kv == KvType::kF32) {
        float f;
        std::memcpy(&f, &from[at * 4], 4);
        return f;
      }
      uint16_t h;
      std::memcpy(&h, &from[at * 2], 2);
      return half_to_float(h);
    };
    const double store = c.kv == KvType::kF16 ? 0x1p-11 : 0;
    for (int64_t i = 0; i < t; ++i)
      for (int64_t h = 0; h < c.heads + 2 * c.kv_heads; ++h)
        for (int64_t d = 0; d < hd; ++d) {
          const int64_t base = i * l.n + h * hd, half = hd / 2, p = position[i];
          const int64_t at = (sequence[i] * ctx + p) * kv_cols + (h - c.heads) % c.kv_heads * hd + d;
          if (h >= c.heads + c.kv_heads) {
            near(cached(v, at), want[base + d],
                 bound[base + d] * (1 + store) + store * std::abs(want[base + d]) + 1e-7);
            continue;
          }
          const int64_t j = d % half;
          const double cosine = table[p * hd + 2 * j], sine = table[p * hd + 2 * j + 1];
          const double u = want[base + j], z = want[base + half + j];
          const double expected = d < half ? u * cosine - z * sine : u * sine + z * cosine;
          const double limit =
              bound[base + j] + bound[base + half + j] + 0x1p-21 * (std::abs(u) + std::abs(z));
          if (h < c.heads)
            near(y[i * q_cols + h * hd + d], expected, limit);
          else
            near(cached(k, at), expected, limit * (1 + store) + store * std::abs(expected) + 1e-7);
        }
    // Other rows of the cache are untouched.
    int64_t written = 0;
    for (int64_t r = 0; r < sequences * ctx; ++r) {
      bool same = true;
      for (int64_t b = 0; b < kv_cols * kv_type_bytes(c.kv); ++b)
        same &= k[r * kv_cols * kv_type_bytes(c.kv) + b] == 0xa5 &&
                v[r * kv_cols * kv_type_bytes(c.kv) + b] == 0xa5;
      written += !same;
    }
    REQUIRE(written == t);
  }

  for (int again = 0; again < 2; ++again) {
    if (c.residual && c.epilogue == Epilogue::kNone) {  // and in place
      dy.put(residual);
      a.residual = dy.data();
    }
    linear_decode_cuda(&a, 1, nullptr, nullptr, again == 1);
    cuda_check(cudaDeviceSynchronize(), "linear_decode");
    REQUIRE(dy.get() == y);
  }
}

}  // namespace

TEST_CASE("linear_decode on the device: formats, grids, groups, odd shapes") {
  if (no_device()) return;
  for (auto [n, k] : {std::pair<int64_t, int64_t>{1, 1}, {17, 172}, {48, 257}, {192, 576}, {66, 2048}})
    for (int64_t group : {int64_t(32), int64_t(64), int64_t(128), k})
      for (int64_t tokens : {1, 3, 8, 11}) {
        if (quick() > 1 && (n == 192 || group == 128 || tokens == 3)) continue;
        check({.layout = {.n = n, .k = k, .group = group}, .tokens = tokens});
        check({.layout = {.n = n, .k = k, .group = group},
               .grid = Grid::kHalf,
               .tokens = tokens,
               .residual = true});
        check({.layout = {.n = n, .k = k, .group = group, .bits = 8}, .tokens = tokens, .norm = true});
        check({.layout = {.n = n, .k = k, .bits = 16}, .tokens = tokens, .norm = true});
      }
}

TEST_CASE("linear_decode on the device: larger than a wave, long K, many tokens") {
  if (no_device()) return;
  check({.layout = {.n = 16 * 300, .k = 128, .group = 64}, .tokens = 2, .norm = true});
  for (int64_t tokens : {1, 2, 16}) {
    check({.layout = {.n = 4800, .k = 320, .group = 128}, .tokens = tokens, .norm = true, .residual = true});
    check({.layout = {.n = 96, .k = 11008, .group = 128}, .tokens = tokens, .residual = true});
    check({.layout = {.n = 40, .k = 28672, .group = 128}, .tokens = tokens, .residual = true});
  }
}

TEST_CASE("linear_decode on the device: gate and up") {
  if (no_device()) return;
  for (int64_t tokens : {1, 5, 16})
    for (auto [f, k] : {std::pair<int64_t, int64_t>{1, 64}, {172, 64}, {344, 288}, {2200, 128}})
      for (Grid grid : {Grid::kInt, Grid::kHalf})
        check({.layout = {.n = 2 * f, .k = k, .group = 64, .map = RowMap::kPairHalves},
               .grid = grid,
               .tokens = tokens,
               .norm = true,
               .epilogue = Epilogue::kSwiglu});
}

TEST_CASE("linear_decode on the device: rotation and cache") {
  if (no_device()) return;
  for (int64_t tokens : {1, 4, 13})
    for (int64_t hd : {16, 48, 64, 128})
      for (KvType kv : {KvType::kF16, KvType::kF32})
        for (int64_t shared : {1, 3})
          check({.layout = {.n = (2 * shared + 4) * hd,
                            .k = 96,
                            .group = 32,
                            .map = RowMap::kRope,
                            .head_dim = hd,
                            .rotated = (2 * shared + 2) * hd},
                 .tokens = tokens,
                 .norm = true,
                 .epilogue = Epilogue::kRopeKv,
                 .heads = 2 * shared,
                 .kv_heads = 2,
                 .kv = kv});
}

TEST_CASE("linear_decode on the device: x of any size") {
  if (no_device()) return;
  for (float size : {1e-30f, 1e-6f, 1e6f, 1e30f})
    check({.layout = {.n = 33, .k = 300, .group = 64}, .tokens = 3, .size = size});
}

// A layer's products as one chain give the bits that they give one by one, every time.
TEST_CASE("linear_decode on the device: chains") {
  if (no_device()) return;
  struct Sizes {
    int64_t hidden, ffn, head_dim, heads, kv_heads, groups[4];
    int bits;
  };
  for (const Sizes& s :
       {Sizes{576, 1536, 64, 9, 3, {64, 64, 64, 64}, 4}, Sizes{2048, 5632, 64, 32, 4, {128, 32, 64, 128}, 4},
        Sizes{288, 172, 48, 6, 6, {32, 32, 172, 288}, 8}, Sizes{64, 8192, 16, 4, 4, {}, 16},
        Sizes{1024, 28672, 128, 8, 2, {128, 1024, 256, 128}, 4}})
    for (int64_t tokens = 1; tokens <= linear_decode_chain_tokens(s.bits); ++tokens) {
      if (quick() > 1 && (s.hidden > 600 || (tokens & (tokens - 1)) != 0)) continue;
      CAPTURE(s.hidden);
      CAPTURE(tokens);
      const int64_t q = s.heads * s.head_dim, kv = s.kv_heads * s.head_dim, ctx = 16;
      const Q4Layout layouts[4] = {
          {.n = s.hidden, .k = q, .group = s.groups[0], .bits = s.bits},
          {.n = 2 * s.ffn, .k = s.hidden, .group = s.groups[1], .map = RowMap::kPairHalves, .bits = s.bits},
          {.n = s.hidden, .k = s.ffn, .group = s.groups[2], .bits = s.bits},
          {.n = q + 2 * kv,
           .k = s.hidden,
           .group = s.groups[3],
           .map = RowMap::kRope,
           .head_dim = s.head_dim,
           .rotated = q + kv,
           .bits = s.bits}};
      std::vector<std::unique_ptr<Weights>> weights;
      for (const Q4Layout& l : layouts)
        weights.push_back(std::make_unique<Weights>(Case{.layout = l, .grid = Grid::kHalf}));
      std::vector<float> x(size_t(tokens * q)), stream(size_t(tokens * s.hidden)), gain(size_t(s.hidden)),
          table(size_t(ctx * s.head_dim), 0.6f);
      fill_normal(x, 1), fill_normal(stream, 2), fill_normal(gain, 3);
      std::vector<int32_t> position, sequence(size_t(tokens), 0);
      for (int64_t i = 0; i < tokens; ++i) position.push_back(int32_t(i));
      DeviceGuarded<float> dx{std::span<const float>(x)}, dstream(tokens * s.hidden),
          dgain{std::span<const float>(gain)}, dtable{std::span<const float>(table)}, dhidden(tokens * s.ffn),
          dq(tokens * q);
      DeviceGuarded<int32_t> dposition{std::span<const int32_t>(position)},
          dsequence{std::span<const int32_t>(sequence)};
      DeviceGuarded<uint8_t> dk(ctx * kv * 2), dv(ctx * kv * 2);
      const std::vector<uint8_t> zero(kLinearDecodeExchange);
      DeviceGuarded<uint8_t> exchange{std::span<const uint8_t>(zero)};
      const auto run_chain = [&](const LinearDecodeArgs* from, size_t count, bool pdl) {
        linear_decode_cuda(from, count, reinterpret_cast<std::byte*>(exchange.data()), nullptr, pdl);
      };
      const auto w = [&](int i) {
        return TiledWeight{layouts[i], Grid::kHalf, weights[size_t(i)]->codes.data(),
                           weights[size_t(i)]->tile_scales.data()};
      };
      const LinearDecodeArgs chain[4] = {
          {.x = dx.data(), .w = w(0), .residual = dstream.data(), .y = dstream.data(), .tokens = tokens},
          {.x = dstream.data(),
           .gain = dgain.data(),
           .eps = 1e-5f,
           .w = w(1),
           .epilogue = Epilogue::kSwiglu,
           .y = dhidden.data(),
           .tokens = tokens},
          {.x = dhidden.data(), .w = w(2), .residual = dstream.data(), .y = dstream.data(), .tokens = tokens},
          {.x = dstream.data(),
           .gain = dgain.data(),
           .eps = 1e-5f,
           .w = w(3),
           .epilogue = Epilogue::kRopeKv,
           .y = dq.data(),
           .tokens = tokens,
           .table = dtable.data(),
           .at = {dposition.data(), dsequence.data()},
           .kv = {dk.data(), dv.data(), KvType::kF16, ctx},
           .heads = s.heads,
           .kv_heads = s.kv_heads}};
      std::vector<float> first_stream, first_q;
      std::vector<uint8_t> first_k;
      for (int run = 0; run < (quick() > 1 ? 2 : 20); ++run) {
        dstream.put(stream);
        if (run == 0)
          for (const LinearDecodeArgs& a : chain) run_chain(&a, 1, false);
        else
          run_chain(chain, run % 2 ? 4 : 2, run % 3 == 0);
        if (run > 0 && run % 2 == 0) run_chain(chain + 2, 2, true);
        cuda_check(cudaDeviceSynchronize(), "chain");
        if (run == 0) {
          first_stream = dstream.get(), first_q = dq.get(), first_k = dk.get();
          continue;
        }
        REQUIRE(dstream.get() == first_stream);
        REQUIRE(dq.get() == first_q);
        REQUIRE(dk.get() == first_k);
      }
    }
}
